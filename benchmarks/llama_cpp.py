"""Compares checkpoints of epmq with llama.cpp's own Q4_0 of the dense merge: perplexity and tokens a second.

    epmq merge --config-dir benchmarks/smollm/configs suite=smollm pack.dtype=float16 out=runs/llama/dense
    epmq run --config-dir benchmarks/smollm/configs suite=smollm group_size=32 pack.dtype=float16 out=runs/llama/feature
    python -m venv LLAMA && LLAMA/bin/pip install xllamacpp numpy
    python benchmarks/llama_cpp.py --python LLAMA/bin/python --dense runs/llama/dense/checkpoint \
        --checkpoints runs/llama/feature/checkpoint --texts runs/smollm/data/*/test.jsonl

All files have embeddings in Q8_0, so that they differ in the linears only. Q4_0 of the merge is rounded by the package
gguf, whose rounding is that of llama.cpp's quantizer. llama.cpp rounds activations to 8 bits in front of such blocks.
Each text gives its first tokens; perplexities are those of all tokens of a file of texts together. The kinds take
turns; a speed is the median of all turns.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from epmq_cli.checkpoint.gguf.write import GgufFile

SIDE = Path(__file__).parent / "references" / "llama_cpp_side.py"


class RoundedFile(GgufFile):
    """A dense checkpoint whose linears are rounded by llama.cpp; embeddings stay as `dense` says."""

    def _kind(self, shape: tuple[int, ...]) -> str:
        linear = len(shape) > 1 and shape[0] != self._config["vocab_size"]
        return "Q4_0" if linear else super()._kind(shape)


def files_of(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Writes all files; returns their names in the table."""
    files = {"merge, F16": folder / "dense.gguf", "merge, Q4_0 by llama.cpp": folder / "rounded.gguf"}
    GgufFile(options.dense, "f16").write(files["merge, F16"])
    RoundedFile(options.dense, "q8_0").write(files["merge, Q4_0 by llama.cpp"])
    for number, checkpoint in enumerate(options.checkpoints):
        name = f"{checkpoint.parent.name}, Q4_0 by epmq"
        files[name] = folder / f"{number}.gguf"
        GgufFile(checkpoint, "q8_0").write(files[name])
    return files


def tokens_of(path: Path, tokenizer: Any, documents: int, length: int) -> list[list[int]]:
    """The first tokens of the first texts of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()[:documents]
    return [tokenizer(json.loads(line)["text"])["input_ids"][:length] for line in lines]


def measured(python: Path, file: Path, texts: Path, repeats: int) -> dict[str, Any]:
    """What the side prints."""
    command = [str(python), str(SIDE), str(file), str(texts), str(repeats)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Parses the command line and prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="the Python of an environment with xllamacpp")
    parser.add_argument("--dense", type=Path, required=True, help="the checkpoint of the dense merge")
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    names = [path.parent.name for path in options.texts]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = files_of(options, folder)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
        for path, name in zip(options.texts, names, strict=True):
            texts = folder / f"{name}.json"
            texts.write_text(json.dumps(tokens_of(path, tokenizer, options.documents, options.length)))
            for kind, file in files.items():
                found[kind].append(measured(options.python, file, texts, options.repeats))
        sizes = {kind: file.stat().st_size / 1e6 for kind, file in files.items()}
    print(f"| SmolLM2 | MB | {' | '.join(f'perplexity, {name}' for name in names)} | both | tokens a second |")
    print(f"|{'---|' * (len(names) + 4)}")
    for kind, parts in found.items():
        loss, count = sum(part["loss"] for part in parts), sum(part["count"] for part in parts)
        cells = [f"{math.exp(part['loss'] / part['count']):.2f}" for part in parts]
        speed = median(speed for part in parts for speed in part["speeds"])
        print(f"| {kind} | {sizes[kind]:.0f} | {' | '.join(cells)} | {math.exp(loss / count):.2f} | {speed:.1f} |")


if __name__ == "__main__":
    main()
