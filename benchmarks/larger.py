"""Merges, calibrates, quantizes and writes a model that is larger than its memory limit.

    sudo python benchmarks/larger.py [--limit 1500] [--layers 40]
    python benchmarks/larger.py --device cuda --limit 24000 --like 8b
    PYTHONPATH=tests/standin python benchmarks/larger.py --device cuda --limit 75 --like tiny      # without a GPU
    PYTHONPATH=tests/standin python benchmarks/larger.py --device cuda --limit 62 --like 8b-small --layers 3
    sudo python benchmarks/larger.py --limit 2900 --like 8b-quarter --memory 500MB

The model is a random Llama (hidden 1024, intermediate 2816; 40 layers are 2.05 GB in float32, `--like 8b` has the shape
of Llama 3 8B) with two experts in bfloat16. It is made once in runs/larger. `epmq run` with feature guidance runs once
for each place of the student. On the CPU, it runs in a memory cgroup (version 1 or 2; root is needed) of `--limit` MB;
on a GPU, torch may take `--limit` MB of it. The run with `calib.student=memory` must fail; otherwise the limit shows
nothing. The estimates are those of `epmq run --plan`; with `--plan` nothing else runs, and the models have no weights.

`--like 8b-small` has a sixteenth of the widths, vocabulary and tokens of 8b, and epmq computes in pieces, groups and
blocks that are as much smaller, so that 1 MB of a GPU stands for 256 MB. `8b-quarter` has a quarter, so that 1 MB
beside the libraries stands for 16 MB.
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
SMALLER = {"8b-small": 16, "8b-quarter": 4}
"""How many times widths, vocabulary and tokens are smaller than those of 8b."""
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
for like, times in SMALLER.items():
    SHAPES[like] = {name: size // times for name, size in SHAPES["8b"].items()}
    SHAPES[like] |= {"num_attention_heads": 8, "num_key_value_heads": 2}


def pieces_of(times: int) -> dict[str, int]:
    """The sizes of what epmq computes at a time, for a model with widths that are smaller by this factor."""
    square = times**2
    return {
        "epmq_cli.calibrate.row_pieces.PIECE": (1 << 24) // square,
        "epmq_cli.calibrate.moments.PANEL": 512 // times,
        "epmq_cli.quantize.linalg.PANEL": 512 // times,
        "epmq_cli.quantize.gptq.PANEL": 512 // times,
        "epmq_cli.quantize.scale_search.CHUNK": (1 << 22) // square,
        "epmq_cli.quantize.linalg.LARGE": 4096 // times,
        "epmq_cli.runtime.block_offload.LARGE": (1 << 25) // square,
    }


STARTED = """
import importlib, json, sys, torch
from epmq_cli.cli import main
for place, value in json.loads(sys.argv.pop(1)).items():
    module, _, name = place.rpartition(".")
    setattr(importlib.import_module(module), name, value)
if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(int(sys.argv[1]) / total)
sys.argv.pop(1)
main()
"""
"""Starts epmq with values of constants, and a limit on the memory of the GPU in bytes."""
GROUPS = Path("/sys/fs/cgroup")


def make(folder: Path, shape: dict[str, int], length: int, weights: bool) -> None:
    """Makes base, experts, text and suite; without weights, the files of the models have headers and holes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "configs").is_dir():
        return
    torch.manual_seed(0)
    with torch.device("cpu" if weights else "meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    vocabulary = shape["vocab_size"]
    made = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name in ("base", *EXPERTS):
        if weights:
            with torch.no_grad():
                for parameter in model.parameters():
                    if name != "base":
                        parameter.add_(0.002 * torch.randn_like(parameter))
            model.save_pretrained(folder / name)
        else:
            model.config.save_pretrained(folder / name)
            write_header(folder / name / "model.safetensors", {n: t.shape for n, t in model.state_dict().items()})
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder / name)
    data = {"_target_": "epmq_cli.data.table.Table"}
    for split, count in {"train": 20_000, "test": 2_000}.items():
        words = " ".join(f"w{index}" for index in torch.randint(vocabulary, (count,)).tolist())
        data[split] = str(folder / f"{split}.jsonl")
        Path(data[split]).write_text(json.dumps({"text": words, "label": 0}) + "\n")
    each = {"metric": "perplexity", "max_length": length, "data": data}
    tasks = {name: {"expert": str(folder / name), **each} for name in EXPERTS}
    suite = {"_target_": "epmq_cli.data.suite.Suite", "name": "larger", "family": "causal_lm", "tasks": tasks}
    (folder / "configs" / "suite").mkdir(parents=True)
    (folder / "configs" / "suite" / "larger.yaml").write_text(json.dumps({**suite, "base": str(folder / "base")}))


def write_header(file: Path, shapes: dict[str, torch.Size]) -> None:
    """Writes a safetensors file of bfloat16 tensors without their values, which take no space on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + end)


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


def arguments_of(folder: Path, student: str, device: str, memory: str, times: int) -> list[str]:
    """Returns the arguments of the run. `times`: see SMALLER; 1 for other models."""
    options = ["guidance=feature", f"calib.samples={SAMPLES}", f"calib.memory={memory}", f"calib.student={student}"]
    options += ["calib.batch_size=8", "eval.batch_size=8", "eval.stages=[quantized]", "cache=false", f"device={device}"]
    options += [f"group_size={64 // times}", f"quant.block_size={128 // times}"] if times > 1 else []
    return ["--config-dir", str(folder / "configs"), "suite=larger", *options]


def planned(command: list[str], device: str, pieces: dict[str, int]) -> str:
    """Returns the peaks that `epmq run --plan` estimates."""
    line = [sys.executable, "-c", STARTED, json.dumps(pieces), str(1 << 50), "run", "--plan", *command]
    done = subprocess.run([*line, "--format", "json"], capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout)["estimate"]["memory"]
    return ", ".join(f"{place} {memory[place] / 1e6:.0f} MB" for place in ("host", "device") if memory[place])


def run(folder: Path, limit: int, command: list[str], device: str, pieces: dict[str, int]) -> tuple[int, float, str]:
    """Returns the exit status, the seconds, and the peaks or the last printed line of a run with limited memory."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    start = ["-c", STARTED, json.dumps(pieces), str(limit)]
    with cgroup(limit) if device == "cpu" else nullcontext() as group:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        begin, line = time.perf_counter(), [sys.executable, *start, "run", *command, f"out={out}"]
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
    parser.add_argument("--layers", type=int, help="40, or 32 of --like 8b and its smaller kin")
    parser.add_argument("--like", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", default="50MB", help="calib.memory")
    parser.add_argument("--plan", action="store_true", help="print estimates alone, of models without weights")
    parser.add_argument("--out", type=Path, default=Path("runs/larger"))
    arguments = parser.parse_args()
    layers = arguments.layers or (32 if arguments.like.startswith("8b") else 40)
    folder = (arguments.out / f"{arguments.like}-{layers}{'-headers' * arguments.plan}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    times = SMALLER.get(arguments.like, 1)
    shape = {**SHAPES[arguments.like], "num_hidden_layers": layers}
    make(folder, shape, LENGTH // times, not arguments.plan)
    stored, pieces = (folder / "base" / "model.safetensors").stat().st_size, pieces_of(times) if times > 1 else {}
    print(f"{2 * stored / 1e6:.0f} MB in float32; files of {3 * stored / 1e6:.0f} MB; allowed {arguments.limit} MB\n")
    print("| student | estimate | exit status | seconds | peaks or last line |\n|---|---|---|---|---|")
    for student in ("disk", "memory") if arguments.device == "cpu" else ("disk", "cpu", "memory"):
        command = arguments_of(folder, student, arguments.device, arguments.memory, times)
        estimate = planned(command, arguments.device, pieces)
        status, seconds, said = (
            ("", 0.0, "") if arguments.plan else run(folder, arguments.limit * 10**6, command, arguments.device, pieces)
        )
        print(f"| {student} | {estimate} | {status} | {seconds:.0f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
