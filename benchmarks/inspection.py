"""Times `epmq inspect` of a folder of 1 GB, imports included.

    python benchmarks/inspection.py [--folder FOLDER] [--repeat 9]

The folder holds a Llama in bfloat16 with random weights (hidden 2048, 8 layers, a table of 32000 tokens), in files of
at most 300 MB; it is made once. `first` is a call with an empty cache, which asks the family what it does with each
tensor and imports torch; `again` is the median of the calls after it, for the same architecture of any size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HIDDEN, INNER, LAYERS, VOCABULARY = 2048, 5632, 8, 32000
SHARD = 300 * 10**6
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the model."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            yield f"{prefix}self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            yield f"{prefix}mlp.{name}_proj.weight", (INNER, HIDDEN)
        yield f"{prefix}mlp.down_proj.weight", (HIDDEN, INNER)
        for name in ("input", "post_attention"):
            yield f"{prefix}{name}_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make(folder: Path) -> int:
    """Writes the model; returns its bytes."""
    import torch

    from epmq_cli.store.safetensors_writer import Entry, write_model

    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        entries = [
            Entry(
                name,
                torch.bfloat16,
                shape,
                lambda shape=shape: torch.randn(shape, generator=generator).to(torch.bfloat16),  # type: ignore[misc]
            )
            for name, shape in shapes()
        ]
        write_model(folder, entries, SHARD)
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def seconds(arguments: list[str], cache: str) -> tuple[float, float]:
    """The wall time and the processor time of one call of epmq inspect."""
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "epmq_cli", "inspect", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "EPMQ_CACHE": cache})
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/inspection"))
    parser.add_argument("--repeat", type=int, default=9)
    chosen = parser.parse_args()
    size = make(chosen.folder)
    with tempfile.TemporaryDirectory() as cache:
        first = seconds([str(chosen.folder)], cache)
        again = [seconds([str(chosen.folder)], cache) for _ in range(chosen.repeat)]
    wall, processor = (statistics.median(part) for part in zip(*again, strict=True))
    print(f"{size / 1e9:.2f} GB, first: {first[0]:.2f} s, of the processor {first[1]:.2f} s")
    print(f"again, median of {len(again)}: {wall:.2f} s, of the processor {processor:.2f} s")
    print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
