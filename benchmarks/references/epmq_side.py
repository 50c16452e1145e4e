"""Merges model folders with epmq, for benchmarks/merges.py.

    python epmq_side.py --base DIR --experts DIR DIR DIR --out DIR --method NAME --options JSON

Writes model.safetensors in OUT and prints one line: {"seconds": ..., "peak_bytes": ...}, from the opened files to the
written one, and the growth of the process's memory meanwhile, without pages of files. `options`: those of `merge=NAME`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf
from side import Watch, run

import epmq_cli.merge.kernels  # noqa: F401  imported here, before the time counts
from epmq_cli.config.instantiate import conf_dir
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.method import MergeMethod
from epmq_cli.merge.named_tensors import NamedTensors
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.store.safetensors_writer import Entry, write_file


def tensors(folder: ModelFolder) -> NamedTensors:
    """All tensors of a folder."""
    return NamedTensors(folder, {name: name for name in folder.infos})


def method_of(name: str, options: dict[str, Any]) -> MergeMethod:
    """The shipped method `merge=NAME` with some options."""
    cfg = OmegaConf.create({"seed": 0, "merge": OmegaConf.load(conf_dir() / "merge" / f"{name}.yaml")})
    cfg.merge = OmegaConf.merge(cfg.merge, options)
    method: MergeMethod = hydra.utils.instantiate(cfg.merge, _convert_="all")
    return method


def merge(job: dict[str, Any]) -> dict[str, float]:
    """Merges and returns the measurements."""
    out, method = Path(job["out"]), method_of(job["method"], job["options"])
    out.mkdir(parents=True, exist_ok=True)
    watch = Watch()
    base, *experts = (ModelFolder(Path(path), Path(path).name) for path in (job["base"], *job["experts"]))
    source = MergeSource(tensors(base), {expert.role: tensors(expert) for expert in experts})
    method.check(source.tasks)
    merged = LazyMerge(source, method, torch.float32)
    entries = [
        Entry(name, source.dtype(name), source.shape(name), partial(merged.stored, name, source.dtype(name)))
        for name in source.names
    ]
    write_file(out / "model.safetensors", entries)
    return watch.end()


if __name__ == "__main__":
    run(merge, __doc__)
