"""Size and sha256 of files."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 22


@dataclass(frozen=True)
class Content:
    """A file's bytes: how many, and their sha256 in hexadecimal."""

    size: int
    sha256: str


def contents(paths: list[Path]) -> dict[Path, Content]:
    """What each of some files holds."""
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        return dict(zip(paths, pool.map(content, paths), strict=True))


def content(path: Path) -> Content:
    """What a file holds."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return Content(path.stat().st_size, digest.hexdigest())
