"""Merges, calibrates, quantizes and writes a model that is larger than its memory limit.

    sudo python benchmarks/larger.py [--limit 1500] [--layers 40]
    python benchmarks/larger.py --device cuda --limit 24000 --like 8b
    PYTHONPATH=tests/standin python benchmarks/larger.py --device cuda --limit 75 --like tiny      # without a GPU

The model is a random Llama (hidden 1024, intermediate 2816; 40 layers are 2.05 GB in float32, `--like 8b` has the shape
of Llama 3 8B) with two experts in bfloat16. It is made once in runs/larger. `epmq run` with feature guidance runs once
for each place of the student. On the CPU, it runs in a memory cgroup (version 1 or 2; root is needed) of `--limit` MB;
on a GPU, torch may take `--limit` MB of it. The run with `calib.student=memory` must fail; otherwise the limit shows
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

EXPERTS = ("one", "two")
LENGTH, SAMPLES = 128, 8
SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "vocab_size": 2000},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 2000},
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
LIMITED = """
import sys, torch
from epmq_cli.cli import main
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(int(sys.argv.pop(1)) / total)
main()
"""
"""Starts epmq with a limit on the memory of the GPU, in bytes."""
GROUPS = Path("/sys/fs/cgroup")


def make(folder: Path, shape: dict[str, int]) -> None:
    """Makes base, experts, text and suite."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "configs").is_dir():
        return
    torch.manual_seed(0)
    model, vocabulary = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16), shape["vocab_size"]
    made = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name in ("base", *EXPERTS):
        with torch.no_grad():
            for parameter in model.parameters():
                if name != "base":
                    parameter.add_(0.002 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder / name)
    words = " ".join(f"w{index}" for index in torch.randint(vocabulary, (20_000,)).tolist())
    (folder / "text.jsonl").write_text(json.dumps({"text": words, "label": 0}) + "\n")
    text = str(folder / "text.jsonl")
    data = {"_target_": "epmq_cli.data.table.Table", "train": text, "test": text}
    each = {"metric": "perplexity", "max_length": LENGTH, "data": data}
    tasks = {name: {"expert": str(folder / name), **each} for name in EXPERTS}
    suite = {"_target_": "epmq_cli.data.suite.Suite", "name": "larger", "family": "causal_lm", "tasks": tasks}
    (folder / "configs" / "suite").mkdir(parents=True)
    (folder / "configs" / "suite" / "larger.yaml").write_text(json.dumps({**suite, "base": str(folder / "base")}))


@contextmanager
def cgroup(limit: int) -> Iterator[Path]:
    """Creates a memory cgroup of `limit` bytes without swap, and removes it at the end."""
    old = GROUPS / "memory"
    folder = (old if old.is_dir() else GROUPS) / f"epmq-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        sys.exit(f"a memory cgroup takes root and a writable {folder.parent} ({error.strerror}); start this with sudo")
    try:
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if old.is_dir() else ("memory.max",)
        for name in names:
            if (folder / name).exists():
                (folder / name).write_text(str(limit))
        yield folder
    finally:
        folder.rmdir()


def run(folder: Path, limit: int, student: str, device: str) -> tuple[int, float, str]:
    """Returns the exit status, the seconds, and the peaks or the last printed line of a run with limited memory."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    options = ["guidance=feature", f"calib.samples={SAMPLES}", "calib.memory=50MB", f"calib.student={student}"]
    options += ["calib.batch_size=8", "eval.stages=[]", "cache=false", f"device={device}", f"out={out}"]
    command = ["run", "--config-dir", str(folder / "configs"), "suite=larger", *options]
    start = ["-m", "epmq_cli"] if device == "cpu" else ["-c", LIMITED, str(limit)]
    with cgroup(limit) if device == "cpu" else nullcontext() as group:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        begin, line = time.perf_counter(), [sys.executable, *start, *command]
        done = subprocess.run(line, preexec_fn=enter, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begin
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode, seconds, peaks(out) if done.returncode == 0 else lines[-1] if lines else ""


def peaks(out: Path) -> str:
    """The peaks of a finished run."""
    stages = json.loads((out / "metrics.json").read_text())["stages"].values()
    names = {"host": "peak_host_bytes", "GPU": "peak_device_bytes"}
    found = {place: max(stage[name] or 0 for stage in stages) for place, name in names.items()}
    return ", ".join(f"{place} {peak / 1e6:.0f} MB" for place, peak in found.items() if peak)


def main() -> None:
    """Parses the command line and prints one row per place of the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=1500, help="memory limit in MB")
    parser.add_argument("--layers", type=int, help="40, or 32 of --like 8b")
    parser.add_argument("--like", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/larger"))
    arguments = parser.parse_args()
    layers = arguments.layers or (32 if arguments.like == "8b" else 40)
    folder = (arguments.out / f"{arguments.like}-{layers}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make(folder, {**SHAPES[arguments.like], "num_hidden_layers": layers})
    stored = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    print(f"{2 * stored / 1e6:.0f} MB in float32; files of {3 * stored / 1e6:.0f} MB; allowed {arguments.limit} MB\n")
    print("| student | exit status | seconds | peaks or last line |\n|---|---|---|---|")
    for student in ("disk", "memory") if arguments.device == "cpu" else ("disk", "cpu", "memory"):
        status, seconds, said = run(folder, arguments.limit * 10**6, student, arguments.device)
        print(f"| {student} | {status} | {seconds:.0f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
