"""Compares merging in epmq with mergekit and with `cp`: three experts of SmolLM2-135M's shape.

    python benchmarks/merging.py [--repeats 3]

The weights are random, in bfloat16, and made once in runs/merging. mergekit has its own environment there. Every round
runs the commands as whole processes, one after the other, and measures wall seconds and the largest process's peak
memory. `cp` copies the four models that the others read, so it writes more than they do; its rate counts the bytes that
it reads. "Without imports" are the seconds of the stages in epmq's metrics.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import torch

EXPERTS = ("one", "two", "three")
MERGEKIT = "mergekit==0.1.5"
TORCH = "torch==2.13.0"
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def make(folder: Path) -> None:
    """Makes base and experts."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / EXPERTS[-1] / "model.safetensors").is_file():
        return
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    start = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    for name in ("base", *EXPERTS):
        with torch.no_grad():
            for part, parameter in base.named_parameters():
                noise = 0.0 if name == "base" else 0.02 * start[part].std(correction=0)
                parameter.copy_(start[part] + noise * torch.randn_like(parameter))
        base.save_pretrained(folder / name)
        made.save_pretrained(folder / name)


def environment(folder: Path, requirement: str) -> Path:
    """The Python of an environment in which a reference is installed; makes it if it is missing."""
    python = folder.resolve() / "bin" / "python"
    if not (folder / "complete").is_file():
        venv.create(folder, with_pip=True)
        for wanted in ([TORCH], [TORCH, requirement]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        (folder / "complete").touch()
    return python


def sides(folder: Path, mergekit: Path) -> dict[str, list[str]]:
    """Returns the commands to compare; each writes to runs/merging/out."""
    out = str(folder / "out")
    data = {"_target_": "epmq_cli.data.table.Table", "train": "unused.tsv", "test": "unused.tsv"}
    tasks = {name: {"expert": str(folder / name), "data": data, "metric": "perplexity"} for name in EXPERTS}
    suite = {"_target_": "epmq_cli.data.suite.Suite", "name": "merging", "family": "causal_lm", "tasks": tasks}
    path = folder / "configs" / "suite" / "merging.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**suite, "base": str(folder / "base")}))  # JSON is YAML
    found: dict[str, list[str]] = {}
    for method, density in (("task_arithmetic", None), ("ties", 0.2)):
        start = [sys.executable, "-m", "epmq_cli", "merge", "--config-dir", str(folder / "configs")]
        found[f"epmq {method}"] = [*start, "suite=merging", f"merge={method}", f"out={out}"]
        options: dict[str, Any] = {"weight": 0.3} | ({} if density is None else {"density": density})
        entries = [{"model": str(folder / name), "parameters": options} for name in EXPERTS]
        recipe = {"merge_method": method, "base_model": str(folder / "base"), "models": entries, "dtype": "bfloat16"}
        recipe["parameters"] = {"normalize": False}
        (folder / f"{method}.yaml").write_text(json.dumps(recipe))
        found[f"mergekit {method}"] = [str(mergekit), str(folder / f"{method}.yaml"), out, "--lazy-unpickle"]
    found["cp"] = ["cp", "-r", *(str(folder / name) for name in ("base", *EXPERTS)), out]
    return found


def run(command: list[str], out: Path) -> tuple[float, float, float]:
    """Runs a command; returns wall seconds, peak GB, and the seconds of its stages, or all if it records none."""
    shutil.rmtree(out, ignore_errors=True)
    if command[0] == "cp":
        out.mkdir()
    os.sync()
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    wall = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    record = out / "metrics.json"
    stages = json.loads(record.read_text())["stages"].values() if record.is_file() else [{"seconds": wall}]
    return wall, usage.ru_maxrss * 1024 / 1e9, sum(stage["seconds"] for stage in stages)


def main() -> None:
    """Parses the command line, runs the rounds and prints medians and ratios to epmq's times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/merging"))
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    make(folder)
    commands = sides(folder, environment(folder / "env", MERGEKIT).with_name("mergekit-yaml"))
    rounds = [
        {name: run(command, folder / "out") for name, command in commands.items()} for _ in range(arguments.repeats)
    ]
    read = sum(path.stat().st_size for name in ("base", *EXPERTS) for path in (folder / name).glob("*.safetensors"))
    print(f"Medians of {arguments.repeats}, {read / 1e9:.2f} GB read; syncing to the disk is counted\n")
    print("| | seconds | peak, GB | GB/s read | times epmq's | without imports, s | times cp |\n" + "|---" * 7 + "|")
    medians = {name: [statistics.median(r[name][part] for r in rounds) for part in range(3)] for name in commands}
    for name, (seconds, peak, stages) in medians.items():
        own = name.replace("mergekit", "epmq") if name != "cp" else "epmq task_arithmetic"
        ratio = statistics.median(r[name][0] / r[own][0] for r in rounds)
        line = f"| {name} | {seconds:.1f} | {peak:.2f} | {read / seconds / 1e9:.2f} | {ratio:.2f} |"
        copies = statistics.median(r[name][2] / r["cp"][2] for r in rounds)
        print(line + (f" {stages:.2f} | {copies:.2f} |" if name.startswith("epmq") else " | |"))


if __name__ == "__main__":
    main()
