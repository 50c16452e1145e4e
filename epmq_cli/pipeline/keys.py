"""Keys: everything that a result depends on, as JSON.

The cache names its entries by keys, and a run stores its progress under its key, so that it resumes only its own
progress. Keys contain the sha256 of model files and of the values of samples and batches: a copy elsewhere or with
another date has the same key, and changed bytes with the old date have another one. Keys also contain the options, the
packages, epmq's code, the processor and the number of threads.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

import epmq_cli
from epmq_cli.data.batching import Batch
from epmq_cli.data.chats import Chat
from epmq_cli.data.samples import Samples, raw
from epmq_cli.models.lora.config import CONFIG
from epmq_cli.models.lora.folder import is_adapter_file
from epmq_cli.models.model_folder import read_files
from epmq_cli.report.metrics_json import PACKAGES
from epmq_cli.runtime import distributed
from epmq_cli.runtime.versions import installed_version
from epmq_cli.store.cache import FileHashes
from epmq_cli.store.hashing import content, hash_json, hash_parts, hash_tensors

IRRELEVANT = ("out", "resume", "eval", "device", "data_root", "cache")
"""Options that do not change a checkpoint's tensors; keys contain the device's name and the data's values instead."""
PLACES = ("memory", "student")
"""Options of `calib` that only choose where data is stored."""
LIBRARIES = (
    *PACKAGES,
    "pillow",
    "tokenizers",
    "torchvision",
    "open_clip_torch",
    "datasets",
    "numba",
    "scikit-learn",
    "scipy",
)
CPU = Path("/proc/cpuinfo")


def environment(device: torch.device) -> dict[str, Any]:
    """The software and the machine, which affect the last bits of results."""
    versions = {name: installed_version(name) for name in LIBRARIES}
    return {
        "versions": {"python": platform.python_version(), **versions, "of epmq's code": hash_code()},
        "machine": {
            "device": f"{device.type}, {_device_name(device)}",
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "precision": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
        },
    }


def run_key(
    resolved: Mapping[str, Any],
    models: Mapping[str, Mapping[str, str]],
    batches: Mapping[str, Sequence[Batch]],
    device: torch.device,
) -> dict[str, Any]:
    """The key of a run. `resolved`: its config; `models`: the sha256 of the files of each; `batches`: this
    process's calibration batches. Every process must call this; the first process's key is used."""
    hashes = {task: [hash_tensors(batch) for batch in group] for task, group in batches.items()}
    surroundings = environment(device)
    surroundings["machine"]["processes"] = distributed.world_size()
    return {
        "config": settings(resolved),
        "models": models,
        "calibration data": distributed.all_gather(hashes),
        **surroundings,
    }


def settings(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config without the options that do not change the checkpoint's tensors."""
    relevant = {name: value for name, value in resolved.items() if name not in IRRELEVANT}
    return {**relevant, "calib": {name: value for name, value in resolved["calib"].items() if name not in PLACES}}


def differences(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> Iterable[str]:
    """The names of the parts in which two keys of runs differ."""
    for name in sorted({*one, *other}):
        mine, others = one.get(name), other.get(name)
        if isinstance(mine, Mapping) and isinstance(others, Mapping):
            yield from differences(mine, others, f"{where}{name} ")
        elif mine != others:
            yield f"{where}{name}".removeprefix("config ")


def scores_key(evaluation: Any, samples: Sequence[str | None]) -> str | None:
    """A name for the scores of an evaluation on samples with these hashes; None if one of them is None."""
    return None if None in samples else short([type(evaluation).__name__, asdict(evaluation), samples])


def short(key: Any) -> str:
    """The name of a key's folder: 16 hexadecimal digits of its sha256."""
    return hash_json(key)[:16]


def hash_model(path: Path, hashes: FileHashes) -> dict[str, str]:
    """The sha256 of the files that epmq reads from a model, by name; `path`: its folder, or its file."""
    if path.is_file():
        files = {each.name: each for each in (path, *([path.parent / CONFIG] if is_adapter_file(path) else []))}
    else:
        files = {file.relative_to(path).as_posix(): file for file in read_files(path)}
    return hashes.files({name: file for name, file in files.items() if file.is_file()})


def hash_samples(samples: Samples) -> str | None:
    """The sha256 of inputs and labels, with images as stored; None for inputs of an unknown type."""

    def parts() -> Iterator[bytes]:
        yield hash_tensors({} if samples.labels is None else {"labels": samples.labels}).encode()
        if samples.references is not None:
            yield json.dumps([*samples.references]).encode()
        for position in range(len(samples.inputs)):
            yield _bytes(raw(samples.inputs, position))

    try:
        return hash_parts(parts())
    except TypeError:
        return None


@cache
def hash_code() -> str:
    """The sha256 of epmq's own modules: the version does not change during development."""
    files = sorted(Path(epmq_cli.__file__).parent.rglob("*.py"))
    return hash_parts(content(path).sha256.encode() for path in files)


def _bytes(item: Any) -> bytes:
    """The bytes of an input; TypeError if its type is unknown."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, Chat):
        return json.dumps([item.messages, item.tools] if item.tools else item.messages).encode()
    if isinstance(item, str) or (isinstance(item, Sequence) and all(isinstance(part, str) for part in item)):
        return json.dumps(item).encode()
    if isinstance(item, Image):
        return repr((item.mode, item.size, item.getpalette())).encode() + item.tobytes()
    if isinstance(item, np.ndarray):
        return repr((item.dtype, item.shape)).encode() + item.tobytes()
    if isinstance(item, torch.Tensor):
        return hash_tensors({"": item}).encode()
    raise TypeError(type(item).__name__)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


@cache
def _processor() -> str:
    try:
        lines = CPU.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
