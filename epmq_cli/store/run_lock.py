"""A lock on a run folder, and the removal of temporary files that killed processes left in it."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epmq_cli.errors import ConfigError, RunError
from epmq_cli.runtime import distributed
from epmq_cli.runtime.console import log
from epmq_cli.store.atomic import PARTIAL

FOLDER = ".resume"
"""In a run folder until the run is complete: the lock, and the progress so far."""
LOCK = "lock"
RESULTS = ("checkpoint", "metrics.json")
REPORT = "report.html"
"""The page of a run, in its folder."""
LEFT = (*(PARTIAL.format(name) for name in (*RESULTS, REPORT)), ".activations-*", ".student-*")
"""The temporary files that a killed process can leave in the run folder."""


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Locks the run folder for this process and removes temporary files of killed processes; RunError if another
    process holds the lock or the folder cannot be written. The system releases the lock however the process ends."""
    if not distributed.is_main():
        yield
        return
    root = folder / FOLDER
    _refuse_strange(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / LOCK).open("a")
    except OSError as error:
        raise RunError(f"out={folder} cannot be written ({error.strerror}); choose another out") from error
    with file:
        _lock(file.fileno(), folder)
        for path in [*(path for name in LEFT for path in folder.glob(name)), *root.rglob(PARTIAL.format("*"))]:
            remove(path)
        try:
            yield
        finally:
            if root.is_dir() and not any(path.is_dir() for path in root.iterdir()):
                remove(root)


def in_use(folder: Path) -> bool:
    """Whether a process holds the lock of this run folder or of one inside it."""
    return any(_held(path) for path in folder.rglob(f"{FOLDER}/{LOCK}"))


def refuse_used(folder: Path, *results: str) -> None:
    """ConfigError if the run folder already holds one of these results of an earlier run."""
    existing = [name for name in results if (folder / name).exists()]
    if existing:
        raise ConfigError(f"out={folder} already holds {' and '.join(existing)}; choose another out or remove them")


def remove(path: Path) -> None:
    """Removes a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse_strange(folder: Path) -> None:
    """RunError if the progress would be written outside the run folder, or the lock is not a regular file."""
    root, lock = folder / FOLDER, folder / FOLDER / LOCK
    try:
        if root.is_symlink():
            raise RunError(f"{root} is a link to another place; remove it, or choose another out")
        if lock.exists() and not lock.is_file():
            raise RunError(f"{lock} is not a regular file; remove it, or choose another out")
    except OSError as error:
        raise RunError(f"out={folder} cannot be written ({error.strerror}); choose another out") from error


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"another run is using out={folder}; wait until it ends, or choose another out") from None
    except OSError as error:  # file systems without locks
        log.warning("%s cannot be locked: %s", folder, error)


def _held(path: Path) -> bool:
    if not path.is_file():  # opening a pipe blocks
        return False
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
