"""Measures time and peak memory of the whole pipeline at the true size of published models, with random weights.

    python benchmarks/full_size.py clip-vit-base-patch32 --samples 32
    python benchmarks/full_size.py flan-t5-base --samples 32
    python benchmarks/full_size.py clip-vit-base-patch32 flan-t5-base --samples 256 --device cuda
    python benchmarks/full_size.py olmoe-1b-7b --samples 16 --overrides eval.stages=[] calib.batch_size=4

It uses two experts and random data and starts `epmq run` as a user does. The scores are meaningless. Models and data in
runs/full/<model> are reused if they were made for the same options. Of OLMoE, it makes `--layers` layers with the true
widths, few words and bfloat16 files, and counts the tokens that the experts of a block read; with `--experts 16`, 2
instead of 8 of them for each token, which are as many tokens for each.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

TASKS = ("first", "second")
DRIFT = 0.02  # noise of an expert, relative to the standard deviation of the weights
FLAN_T5_BASE = {
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}


LENGTH = 256  # tokens of a text of OLMoE
OLMOE = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "vocab_size": 2004,
}


def save(folder: Path, base: Any, tasks: Sequence[str] = TASKS) -> None:
    """Saves the base and its experts."""
    base.save_pretrained(folder / "base")
    for task in tasks:
        generator, expert = torch.Generator().manual_seed(zlib.crc32(task.encode())), copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                spread = parameter.std(correction=0)
                parameter += DRIFT * spread * torch.randn(parameter.shape, generator=generator)
        expert.save_pretrained(folder / task)


def tokenizer(folder: Path, words: list[str], start: str, end: str) -> None:
    """Saves a tokenizer of whole words with the base."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "<start>", *words])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(name, ids[name]) for name in {start, end} if name]
    made.post_processor = processors.TemplateProcessing(f"{start} $A {end}".strip(), special_tokens=special)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder / "base")


def clip(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes CLIP-ViT-B/32, the default configuration of CLIPConfig, and returns its suite."""
    torch.manual_seed(0)
    config = CLIPConfig()
    config.text_config.eos_token_id = 1
    save(folder, CLIPModel(config).eval())
    CLIPImageProcessor().save_pretrained(folder / "base")
    tokenizer(folder, ["a", "photo", "of", "cat", "dog"], "", "</s>")
    generator, tasks = np.random.default_rng(0), {}
    for task in TASKS:
        images = {
            f"{split}_images": generator.integers(0, 256, (arguments.samples, 224, 224, 3), np.uint8)
            for split in SPLITS
        }
        labels = {f"{split}_labels": np.arange(arguments.samples) % 2 for split in SPLITS}
        np.savez(folder / f"{task}.npz", **images, **labels)
        data = {"_target_": "epmq_cli.data.images.Npz", "path": str(folder / f"{task}.npz")}
        names = {"classes": ["cat", "dog"], "templates": ["a photo of a {}"]}
        tasks[task] = {"expert": str(folder / task), "data": data, **names}
    return {"family": "clip", "tasks": tasks}


def t5(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes FLAN-T5-base with an untied output layer and returns its suite."""
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(**FLAN_T5_BASE, tie_word_embeddings=False)).eval()
    base.lm_head.weight = torch.nn.Parameter(0.05 * torch.randn(base.lm_head.weight.shape))
    save(folder, base)
    for name in ("base", *TASKS):  # as in the published files
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    words = [f"w{number}" for number in range(30000)]
    tokenizer(folder, words, "", "</s>")
    generator, tasks = np.random.default_rng(0), {}
    for task in TASKS:
        paths = {split: folder / f"{task}_{split}.tsv" for split in SPLITS}
        for path in paths.values():
            texts = (" ".join(generator.choice(words, generator.integers(20, 60))) for _ in range(arguments.samples))
            path.write_text("label\ttext\n" + "".join(f"{i % 2}\t{text}\n" for i, text in enumerate(texts)))
        data = {"_target_": "epmq_cli.data.table.Table", **{split: str(path) for split, path in paths.items()}}
        tasks[task] = {"expert": str(folder / task), "data": data, "classes": ["w1", "w2"]}
    return {"family": "t5", "tasks": tasks}


def olmoe(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes layers of OLMoE-1B-7B with an untied output layer and returns their suite."""
    torch.manual_seed(0)
    mixture = {"num_experts": arguments.experts, "num_experts_per_tok": arguments.experts // 8}
    ids = {"pad_token_id": 0, "eos_token_id": 1}
    config = OlmoeConfig(**OLMOE, **mixture, **ids, num_hidden_layers=arguments.layers)
    save(folder, OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval())
    words = [f"w{number}" for number in range(OLMOE["vocab_size"] - 4)]
    tokenizer(folder, words, "", "</s>")
    generator, tasks = np.random.default_rng(0), {}
    for task in TASKS:
        paths = {split: folder / f"{task}_{split}.jsonl" for split in SPLITS}
        for path in paths.values():
            texts = (" ".join(generator.choice(words, LENGTH - 1)) for _ in range(arguments.samples))
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        data = {"_target_": "epmq_cli.data.documents.Documents", **{split: str(path) for split, path in paths.items()}}
        tasks[task] = {"expert": str(folder / task), "data": data, "metric": "perplexity", "max_length": LENGTH}
    return {"family": "causal_lm", "tasks": tasks}


SPLITS = ("train", "test")
MODELS = {"clip-vit-base-patch32": clip, "flan-t5-base": t5, "olmoe-1b-7b": olmoe}


def measure(name: str, arguments: argparse.Namespace) -> None:
    """Makes the suite, runs it and prints the stages from metrics.json."""
    folder = arguments.out / name
    config = folder / "configs" / "suite" / "full.yaml"
    named = f"{name}-{arguments.samples}-{arguments.layers}-{arguments.experts}"
    if not config.is_file() or json.loads(config.read_text())["name"] != named:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        suite = {"_target_": "epmq_cli.data.suite.Suite", "name": named, "base": str(folder / "base")}
        suite |= MODELS[name](folder, arguments)
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps(suite, indent=1))  # JSON is YAML
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    options = [f"out={run}", f"calib.samples={arguments.samples}", f"device={arguments.device}", "cache=false"]
    options += arguments.overrides
    command = [sys.executable, "-m", "epmq_cli", "run", "--config-dir", str(folder / "configs"), "suite=full", *options]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    metrics = json.loads((run / "metrics.json").read_text())
    where, threads = metrics["environment"]["device_name"], metrics["environment"]["threads"]
    print(f"\n{name}, 2 experts, {arguments.samples} samples a task, {where}, {threads} threads: {wall:.0f} s in all,")
    print(f"{used:.0f} s of processors\n")
    print("| stage | seconds | peak host GB | peak device GB |\n|---|---|---|---|")
    for stage, record in metrics["stages"].items():
        device = record["peak_device_bytes"]
        shown = "" if device is None else f"{device / 1e9:.2f}"
        print(f"| {stage} | {record['seconds']:.1f} | {record['peak_host_bytes'] / 1e9:.2f} | {shown} |")
    print(f"\n{json.dumps(metrics['bytes'])}", flush=True)
    if layers := [layer for layer in metrics["layers"] if ".experts." in layer["name"]]:
        print_tokens(layers)


def print_tokens(layers: Sequence[dict[str, Any]]) -> None:
    """Prints how many tokens reach the experts of mixtures. `layers`: the entries of their linears in metrics.json."""
    tokens = sorted({layer["name"].rpartition(".")[0]: layer["tokens"] for layer in layers}.values())
    few = {
        width: sum(count < width for count in tokens) for width in (1, OLMOE["intermediate_size"], OLMOE["hidden_size"])
    }
    print(f"{len(tokens)} experts read {tokens[0]} to {tokens[-1]} tokens, the middle one {tokens[len(tokens) // 2]}")
    print("; ".join(f"{count} read fewer than {width}" for width, count in few.items()))


def main() -> None:
    """Parses the command line and measures each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1, help="of OLMoE")
    parser.add_argument("--experts", type=int, default=64, help="of a block of OLMoE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/full"))
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of the run")
    arguments = parser.parse_args()
    for name in arguments.models:
        measure(name, arguments)


if __name__ == "__main__":
    main()
