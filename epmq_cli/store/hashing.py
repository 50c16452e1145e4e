"""sha256 of files and tensors, and a memory of the files that do not change.

A file of gigabytes is read once. Its sha256 is remembered with its size, times and inode, and used while these stay the
same, as git does for the files that it tracks. Sizes and times alone would not do: a copy of a folder has other times
and must be found again, and fine-tuning changes no header. As in git, a hash is not remembered before the file has been
left alone for `SETTLED`: two writes within one tick of the file system's clock show the same times.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_cli.store.atomic import atomic_file

CHUNK = 1 << 22  # bytes
SETTLED = 2_000_000_000  # nanoseconds


@dataclass(frozen=True)
class Content:
    """A file's bytes: how many, and their sha256 in hexadecimal."""

    size: int
    sha256: str


def content(path: Path) -> Content:
    """The size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return Content(path.stat().st_size, digest.hexdigest())


def contents(paths: Iterable[Path]) -> dict[Path, Content]:
    """The sizes and sha256 of files, read in parallel: hashing releases the interpreter's lock."""
    paths = list(paths)
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(content, paths), strict=True))


def hash_json(value: Any) -> str:
    """The sha256 of a JSON value; the order of an object's keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_parts(parts: Iterable[bytes]) -> str:
    """The sha256 of some pieces in their order; how they are cut counts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and values; the order of the names does not count."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FileHashes:
    """The sha256 of files, remembered in `folder`, one small file each; nothing is remembered where that is None."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def file(self, path: Path) -> str:
        """The sha256 of a file."""
        path = path.resolve()
        state, known = _state(path), self._recall(path)
        if known.get("state") == state and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
        sha256 = content(path).sha256
        if _state(path) == state and time.time_ns() - max(state["modified"], state["changed"]) > SETTLED:
            self._remember(path, {"path": str(path), "state": state, "sha256": sha256})
        return sha256

    def files(self, paths: Mapping[str, Path]) -> dict[str, str]:
        """The sha256 of each of some files, by name."""
        with ThreadPoolExecutor() as pool:
            return dict(zip(paths, pool.map(self.file, paths.values()), strict=True))

    def _memory(self, path: Path) -> Path | None:
        return self._folder and self._folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"

    def _recall(self, path: Path) -> dict[str, Any]:
        if (memory := self._memory(path)) is None:
            return {}
        try:
            record = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def _remember(self, path: Path, record: Mapping[str, Any]) -> None:
        """If the record cannot be written, the file is read again next time."""
        if (memory := self._memory(path)) is not None:
            with suppress(OSError):
                memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with atomic_file(memory, shared=True) as partial:
                    partial.write_text(json.dumps(record), encoding="utf-8")


def _state(path: Path) -> dict[str, int]:
    stat = path.stat()
    times = {"modified": stat.st_mtime_ns, "changed": stat.st_ctime_ns}
    return {"device": stat.st_dev, "inode": stat.st_ino, "size": stat.st_size, **times}
