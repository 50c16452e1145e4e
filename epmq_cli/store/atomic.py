"""Files that are there whole or not at all, whatever stops the process or the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epmq_cli.runtime.signals import deferred

PARTIAL = ".{}.partial"
"""What a file or folder is called until it is whole."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which is on disk and has its name when the block is over.

    Nothing is left of a block that fails. Signals wait until the block is over, so it should be short.
    """
    partial = path.with_name(PARTIAL.format(path.name))
    try:
        with deferred():
            yield partial
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text in UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Returns when the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
