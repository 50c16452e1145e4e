"""Merges the mergekit files in tests/merge/mergekit with epmq and with mergekit 0.1.5, and compares the tensors.

    python -m venv .venv-mergekit
    .venv-mergekit/bin/pip install torch==2.13.0 mergekit==0.1.5
    python benchmarks/mergekit_files.py --mergekit .venv-mergekit/bin/mergekit-yaml

Prints, for each file, the largest absolute difference of an element, the tensor that has it, and the largest absolute
element. Rows of tables are compared by token.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.mergekit import FILES, models, written

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare merges of mergekit files with mergekit's own.")
    parser.add_argument("--mergekit", type=Path, required=True, help="mergekit-yaml of mergekit 0.1.5")
    mergekit = parser.parse_args().mergekit.absolute()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models(folder)
        for file in sorted(FILES.glob("*.yml")):
            path = written(file, folder)
            theirs, ours = folder / f"{file.stem}-theirs", folder / f"{file.stem}-ours"
            cache = f"--lora-merge-cache={folder / 'cache'}"
            _call(str(mergekit), str(path), str(theirs), "--quiet", cache, "--lora-merge-dtype=float32")
            _call(sys.executable, "-m", "epmq_cli", "merge", "merge=mergekit", f"merge.file={path}", f"out={ours}")
            print(f"{file.name:<14} {difference(ours / 'checkpoint', theirs)}", flush=True)


def _call(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ran.stderr[-3000:]}")


def difference(ours: Path, theirs: Path) -> str:
    """The largest difference of two model folders."""
    own, other = _tensors(ours), _tensors(theirs)
    if own.keys() != other.keys():
        return f"the names differ: {sorted(own.keys() ^ other.keys())[:4]}"
    worst, where = 0.0, "every tensor"
    for name, tensor in own.items():
        if tensor.shape != other[name].shape:
            return f"{name} is {list(tensor.shape)} in ours and {list(other[name].shape)} in theirs"
        found = float((tensor.double() - other[name].double()).abs().max())
        if found > worst:
            worst, where = found, name
    largest = max(float(tensor.abs().max()) for tensor in own.values())
    return f"{worst:.1e} in {where}; the largest element is {largest:.2f}, of {len(own)} tensors"


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors by name, tables in the order of their tokens' texts."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    rows = torch.tensor([vocabulary[token] for token in sorted(vocabulary)])
    return {name: tensor[rows] if name in TABLES else tensor for name, tensor in found.items()}


if __name__ == "__main__":
    main()
