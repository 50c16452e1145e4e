"""What files, tensors and samples are, in a few bytes: sha256 of all that they hold.

A file of gigabytes is read once. Its sha256 is then remembered beside its size, times and inode, and taken while these
stay what they are, as git does for the files it tracks. Sizes and times alone would not do, since a copy or a clone of
a folder has other ones and should be found again; neither would headers, since fine-tuning changes no header. Like git,
a hash is not remembered before the file has been left alone for `SETTLED`: what is written within one tick of the file
system's clock would show the same times.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from epmq_cli.data.chats import Chat
from epmq_cli.data.samples import Samples, raw
from epmq_cli.models.lora.config import CONFIG
from epmq_cli.models.lora.folder import is_adapter_file
from epmq_cli.models.model_folder import read_files
from epmq_cli.store.cache import new_file
from epmq_cli.store.hashing import content

SETTLED = 2_000_000_000  # nanoseconds


class Fingerprints:
    """The sha256 of files, remembered in `folder`, one small file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, path: Path) -> dict[str, str]:
        """The sha256 of a model's file, or by name of the files of its folder that are read."""
        if path.is_file():
            files = {each.name: each for each in (path, *([path.parent / CONFIG] if is_adapter_file(path) else []))}
        else:
            files = {str(file.relative_to(path)): file for file in read_files(path)}
        return {name: self.file(file) for name, file in files.items() if file.is_file()}

    def file(self, path: Path) -> str:
        """The sha256 of a file."""
        path = path.resolve()
        memory = self._folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
        state = _state(path)
        known = _remembered(memory)
        if known.get("state") == state and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
        found = content(path).sha256
        if _state(path) == state and time.time_ns() - max(state["modified"], state["changed"]) > SETTLED:
            _remember(memory, {"path": str(path), "state": state, "sha256": found})
        return found


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    times = {"modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    return {"device": found.st_dev, "inode": found.st_ino, "size": found.st_size, **times}


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(memory: Path, fields: Mapping[str, Any]) -> None:
    """Where this cannot be written, the file is read again next time."""
    with suppress(OSError), new_file(memory) as path:
        path.write_text(json.dumps(fields), encoding="utf-8")


def of_bytes(parts: Iterable[bytes]) -> str:
    """Of some pieces, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


@cache
def of_code() -> str:
    """Of epmq's own modules: its version does not change while somebody works on it."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return of_bytes(content(path).sha256.encode() for path in files)


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_samples(samples: Samples) -> str | None:
    """Of inputs and labels, images as they are stored; None where an input is of a kind that is not known here."""

    def parts() -> Iterator[bytes]:
        yield of_tensors({} if samples.labels is None else {"labels": samples.labels}).encode()
        for position in range(len(samples.inputs)):
            yield _bytes(raw(samples.inputs, position))

    try:
        return of_bytes(parts())
    except TypeError:
        return None


def _bytes(item: Any) -> bytes:
    """What an input holds; TypeError where that is not known."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, Chat):
        return json.dumps(item.messages).encode()
    if isinstance(item, str) or (isinstance(item, Sequence) and all(isinstance(part, str) for part in item)):
        return json.dumps(item).encode()
    if isinstance(item, Image):
        return repr((item.mode, item.size, item.getpalette())).encode() + item.tobytes()
    if isinstance(item, np.ndarray):
        return repr((item.dtype, item.shape)).encode() + item.tobytes()
    if isinstance(item, Tensor):
        return of_tensors({"": item}).encode()
    raise TypeError(type(item).__name__)
