"""Merges model folders with epmq, for benchmarks/merges.py.

    python epmq_side.py --base DIR --experts DIR DIR DIR --out DIR --method NAME --options JSON

Writes model.safetensors in OUT and prints one line: {"seconds": ..., "peak_bytes": ...}, from the opened files to the
written one, and the growth of the process's memory meanwhile. `options`: those of `merge=NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf

import epmq_cli.merge.kernels  # noqa: F401  imported here, before the time counts
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


def merge(job: dict[str, Any]) -> dict[str, float]:
    """Merges and returns the measurements."""
    out, name = Path(job["out"]), job["method"]
    out.mkdir(parents=True, exist_ok=True)
    cfg = OmegaConf.create({"seed": 0, "merge": OmegaConf.load(conf_dir() / "merge" / f"{name}.yaml")})
    cfg.merge = OmegaConf.merge(cfg.merge, job["options"])
    method = hydra.utils.instantiate(cfg.merge, _convert_="all")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before, start = memory("VmRSS"), time.perf_counter()
    experts = {Path(path).name: tensors(Path(path)) for path in job["experts"]}
    source = MergeSource(tensors(Path(job["base"])), experts)
    method.check(source.tasks)
    merged = LazyMerge(source, method, torch.float32)
    entries = [
        Entry(name, source.dtype(name), source.shape(name), partial(merged.stored, name, source.dtype(name)))
        for name in source.names
    ]
    write_file(out / "model.safetensors", entries)
    return {"seconds": time.perf_counter() - start, "peak_bytes": memory("VmHWM") - before}


def serve(work: Callable[[dict[str, Any]], dict[str, float]]) -> None:
    """Does each job of the standard input, one a line, in a process of its own that starts with the imports done, and
    prints a line for it."""
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                print(json.dumps(work(job)), flush=True)
                status = 0
            except Exception as error:
                print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            finally:
                os._exit(status)
        os.waitpid(child, 0)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base")
    parser.add_argument("--experts", nargs="+")
    parser.add_argument("--out")
    parser.add_argument("--method")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument(
        "--jobs", action="store_true", help="reads these options from the standard input, one job a line"
    )
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    if given.jobs:
        serve(merge)
    else:
        print(json.dumps(merge(vars(given))))
