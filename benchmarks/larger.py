"""Merges, calibrates, quantizes and writes a model that is larger than its memory limit, in a cgroup.

    sudo python benchmarks/larger.py [--limit 1500] [--layers 40]

The model is a random Llama (hidden 1024, intermediate 2816; 40 layers are 2.05 GB in float32) with two experts in
bfloat16. It is made once in runs/larger. `epmq run` with feature guidance and `calib.student=disk` runs in a memory
cgroup (version 1 or 2; root is needed) of `--limit` MB. A second run keeps the student in memory. The system must
stop that run; otherwise the limit shows nothing.
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
from contextlib import contextmanager
from pathlib import Path

import torch

EXPERTS = ("one", "two")
VOCABULARY, LENGTH, SAMPLES = 2000, 128, 8
GROUPS = Path("/sys/fs/cgroup")


def make(folder: Path, layers: int) -> None:
    """Makes base, experts, text and suite."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "configs").is_dir():
        return
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "num_attention_heads": 16}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY)).to(torch.bfloat16)
    made = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name in ("base", *EXPERTS):
        with torch.no_grad():
            for parameter in model.parameters():
                if name != "base":
                    parameter.add_(0.002 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder / name)
    words = " ".join(f"w{index}" for index in torch.randint(VOCABULARY, (20_000,)).tolist())
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


def run(folder: Path, limit: int, student: str) -> tuple[int, float, str]:
    """Returns the exit status, the seconds and the last printed line of a run in a cgroup."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    options = ["guidance=feature", f"calib.samples={SAMPLES}", "calib.memory=50MB", f"calib.student={student}"]
    options += ["eval.stages=[]", "cache=false", "device=cpu", f"out={out}"]
    start = [sys.executable, "-m", "epmq_cli", "run", "--config-dir", str(folder / "configs"), "suite=larger"]
    with cgroup(limit) as group:

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        begin = time.perf_counter()
        done = subprocess.run([*start, *options], preexec_fn=enter, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begin
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode, seconds, lines[-1] if lines else ""


def main() -> None:
    """Parses the command line and prints one row per location of the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=1500, help="memory limit in MB")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/larger"))
    arguments = parser.parse_args()
    folder = (arguments.out / str(arguments.layers)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make(folder, arguments.layers)
    stored = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    print(f"{2 * stored / 1e6:.0f} MB in float32; files of {3 * stored / 1e6:.0f} MB; allowed {arguments.limit} MB\n")
    print("| student | exit status | seconds | last line |\n|---|---|---|---|")
    for student in ("disk", "memory"):
        status, seconds, line = run(folder, arguments.limit * 10**6, student)
        print(f"| {student} | {status} | {seconds:.0f} | {line} |", flush=True)


if __name__ == "__main__":
    main()
