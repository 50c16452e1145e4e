"""sha256 of files, tensors and JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22  # bytes


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
    import torch  # here, because the cache of answers must not wait for it

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
