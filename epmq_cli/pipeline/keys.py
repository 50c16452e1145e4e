"""What the bytes of a run's result depend on. Progress is kept under the hash of all of it, so that a run goes on from
nothing but its own.

Models count by the sha256 of their files, and calibration data by that of the batches that were drawn: a copy of them
elsewhere or with another date is the same, and what was put in their place with the old date is not. Reading them once
more takes little beside what a run does with them.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_cli.data.batching import Batch
from epmq_cli.evaluate.score import ScoredTask
from epmq_cli.merge.engine import SuiteModels
from epmq_cli.models.model_folder import ModelFolder, read_files
from epmq_cli.pipeline.fingerprints import of_code
from epmq_cli.report.metrics_json import PACKAGES
from epmq_cli.runtime import distributed
from epmq_cli.store.hashing import contents

IRRELEVANT = ("out", "resume", "eval", "device", "data_root")
"""Options that change nothing in what is calibrated: devices count by what they are, data by what they hold."""
PLACES = ("memory", "student")
"""Likewise, of `calib`: where things are kept."""
LIBRARIES = (*PACKAGES, "numba", "tokenizers")
CPU = Path("/proc/cpuinfo")


def settings(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's resolved config without what changes nothing in its checkpoint's tensors."""
    kept = {name: value for name, value in resolved.items() if name not in IRRELEVANT}
    return {**kept, "calib": {name: value for name, value in resolved["calib"].items() if name not in PLACES}}


def identity(
    resolved: Mapping[str, Any], models: SuiteModels, drawn: Mapping[str, Sequence[Batch]], device: torch.device
) -> dict[str, Any]:
    """All that the result depends on, as JSON has it; every process must ask."""
    folders = {"base": models.base, **{f"expert of {task}": expert for task, expert in models.experts.items()}}
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    return {
        "config": settings(resolved),
        "models": {role: _hashed(folder) for role, folder in folders.items()} if distributed.is_main() else {},
        "calibration data": distributed.all_gather({task: of_batches(batches) for task, batches in drawn.items()}),
        "versions": {**versions, "of epmq's code": of_code()},
        "machine": _machine(device),
    }


def digest(content: Any) -> str:
    """The name of JSON content: 16 hexadecimal digits of its sha256."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differences(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> Iterable[str]:
    """The names of what is not the same in two identities."""
    for name in sorted({*one, *other}):
        mine, others = one.get(name), other.get(name)
        if isinstance(mine, Mapping) and isinstance(others, Mapping):
            yield from differences(mine, others, f"{where}{name} ")
        elif mine != others:
            yield f"{where}{name}".removeprefix("config ")


def of_batches(batches: Sequence[Batch]) -> str:
    """The sha256 of some batches."""
    found = hashlib.sha256()
    for batch in batches:
        for name, tensor in batch.items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(_bytes(tensor))
    return found.hexdigest()


def of_scoring(evaluation: Any, tasks: Sequence[ScoredTask], sources: Sequence[Any]) -> str:
    """A name for the scores that an evaluation gives on the test data as they are now: their labels, and the sizes and
    dates of local files."""
    found = [task.samples.labels for task in tasks]
    hashes = [None if labels is None else hashlib.sha256(_bytes(labels)).hexdigest() for labels in found]
    return digest([type(evaluation).__name__, asdict(evaluation), hashes, [_stamps(source) for source in sources]])


def _hashed(folder: ModelFolder) -> dict[str, str]:
    path = folder.path
    root, files = (path.parent, [path]) if path.is_file() else (path, read_files(path))
    return {file.relative_to(root).as_posix(): content.sha256 for file, content in contents(files).items()}


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{device.type}, {name}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
    }


def _processor() -> str:
    try:
        lines = CPU.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _stamps(source: Any) -> dict[str, Any]:
    """Size and date of the files that the fields of a data source name."""
    found: dict[str, Any] = {}
    for field in fields(source) if is_dataclass(source) else ():
        value = getattr(source, field.name)
        if isinstance(value, str):
            found[value] = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in _files(value)]
    return found


def _files(name: str) -> list[Path]:
    """The file of this name, or those in the folder of this name; none where it is some other text."""
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, ValueError, RuntimeError):
        return []
    return sorted(path.rglob("*")) if path.is_dir() else [path] if there else []
