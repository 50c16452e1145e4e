"""Merges model folders with epmq, for benchmarks/merges.py.

    python epmq_side.py --base DIR --experts DIR DIR DIR --out DIR --method NAME --options JSON

Writes model.safetensors in OUT and prints one line: {"seconds": ..., "peak_bytes": ...}, from the opened files to the
written one, and the growth of the process's memory meanwhile. `options`: those of `merge=NAME`.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.source import MergeSource, NamedTensors
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.store.safetensors_writer import Entry, write_file


def memory(field: str) -> int:
    """The process's resident memory (VmRSS), or its peak (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def tensors(path: Path) -> NamedTensors:
    """All tensors of a folder."""
    folder = ModelFolder(path, path.name)
    return NamedTensors(folder, {name: name for name in folder.infos})


def main() -> None:
    """Merges and prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    cfg = OmegaConf.create({"seed": 0, "merge": OmegaConf.load(conf_dir() / "merge" / f"{given.method}.yaml")})
    cfg.merge = OmegaConf.merge(cfg.merge, given.options)
    method = hydra.utils.instantiate(cfg.merge, _convert_="all")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before, start = memory("VmRSS"), time.perf_counter()
    source = MergeSource(tensors(given.base), {path.name: tensors(path) for path in given.experts})
    method.check(source.tasks)
    merged = LazyMerge(source, method, torch.float32)
    entries = [
        Entry(name, source.dtype(name), source.shape(name), partial(merged.stored, name, source.dtype(name)))
        for name in source.names
    ]
    write_file(given.out / "model.safetensors", entries)
    measured = {"seconds": time.perf_counter() - start, "peak_bytes": memory("VmHWM") - before}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
