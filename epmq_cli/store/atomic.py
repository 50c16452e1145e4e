"""Writes files and folders that are either complete or absent, even if the process or the machine stops.

They are written under a temporary name, synced to disk and then renamed. Until then, the previous version stays. An
exception, such as that of a signal, removes the temporary file; after a kill, the next writer removes it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".{}.partial"
"""The temporary name."""


@contextmanager
def atomic_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to `path` after the block. `shared`: several processes may write
    the file at the same time, so each one's temporary name is different."""
    partial = _partial(path, shared)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write into, which is renamed to `path` after the block."""
    partial = _partial(path, shared=False)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for inner in [*partial.rglob("*"), partial]:
            sync(inner)
        partial.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8 atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes bytes atomically."""
    with atomic_file(path) as partial:
        partial.write_bytes(data)


def sync(path: Path) -> None:
    """Returns when the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(path: Path, shared: bool) -> Path:
    return path.with_name(PARTIAL.format(f"{path.name}.{secrets.token_hex(8)}" if shared else path.name))
