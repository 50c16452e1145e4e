"""Compares merging LoRA adapters in their common low-rank space (merge.space=core) with merging dense task vectors.

    python benchmarks/core_space.py [--methods tsv_m task_arithmetic] [--matrices 8]

Eight adapters of rank 16 with random weights, on matrices (1024, 4096). Every merge is a process of its own with one
thread. The table has seconds from the opened models, the growth of the process's memory meanwhile, without pages of
files, and the largest difference of the two results as a fraction of the largest change.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.lora.adapter import Adapted
from epmq_cli.models.model_folder import ModelFolder

sys.path.insert(0, str(Path(__file__).parent / "references"))
from epmq_side import method_of, tensors
from side import Watch

EXPERTS, RANK, ROWS, COLUMNS = 8, 16, 1024, 4096


def make(root: Path, matrices: int) -> None:
    """Writes the base and the adapters."""
    torch.manual_seed(0)
    names = [f"layers.{number}.linear" for number in range(matrices)]
    (root / "base").mkdir()
    (root / "base" / "config.json").write_text("{}")
    base = {f"{name}.weight": torch.randn(ROWS, COLUMNS) / COLUMNS**0.5 for name in names}
    save_file(base, root / "base" / "model.safetensors")
    for number in range(EXPERTS):
        folder = root / f"expert{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": RANK, "r": RANK}))
        parts = {f"{name}.lora_A.weight": torch.randn(RANK, COLUMNS) / COLUMNS**0.5 for name in names}
        parts |= {f"{name}.lora_B.weight": torch.randn(ROWS, RANK) / ROWS**0.5 for name in names}
        save_file(parts, folder / "adapter_model.safetensors")


def merge(root: Path, name: str, space: str, results: multiprocessing.Queue[dict[str, float]]) -> None:
    """Merges, writes the result, and sends the measurements."""
    torch.set_num_threads(1)
    method, base = method_of(name, {"space": space}), ModelFolder(root / "base", "base")
    watch, experts = Watch(), {}
    for number in range(EXPERTS):
        folder = root / f"expert{number}"
        adapted = Adapted(folder, folder.name, base, [])
        experts[folder.name] = tensors(ModelFolder(folder, folder.name, base.config, adapted))
    source = MergeSource(tensors(base), experts)
    merged = LazyMerge(source, method, torch.float32)
    result = {part: merged.tensor(part) for part in source.names}
    results.put(watch.end())
    save_file(result, root / f"{space}.safetensors")


def difference(root: Path) -> float:
    """The largest difference between the results, as a fraction of the largest change."""
    base, full, core = (
        load_file(root / name) for name in ("base/model.safetensors", "full.safetensors", "core.safetensors")
    )
    change = max(float((full[name] - base[name]).abs().max()) for name in base)
    return max(float((full[name] - core[name]).abs().max()) for name in base) / change


def main() -> None:
    """Parses the command line, and prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "tsv_m"])
    parser.add_argument("--matrices", type=int, default=8)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("| merge | space=full | space=core | difference |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, given.matrices)
        for name in given.methods:
            cells = []
            for space in ("full", "core"):
                results: multiprocessing.Queue[dict[str, float]] = context.Queue()
                process = context.Process(target=merge, args=(root, name, space, results))
                process.start()
                found = results.get()
                process.join()
                cells.append(f"{found['seconds']:.1f} s, {found['peak_bytes'] / 1e6:.0f} MB")
            print(f"| {name} | {' | '.join(cells)} | {difference(root):.0e} |", flush=True)


if __name__ == "__main__":
    main()
