"""A run folder for one process alone, and what killed ones left in it."""

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
"""In a run folder, as long as it is not complete: a lock that no two processes hold, and what was found so far."""
LOCK = "lock"
RESULTS = ("checkpoint", "metrics.json")
LEFT = (*(PARTIAL.format(name) for name in RESULTS), ".activations-*", ".student-*")
"""What a killed process may have left in the run folder."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The run folder for this process alone, cleared of what killed ones left half done; RunError where another one has
    it or it cannot be written. The lock is the system's, which takes it back from a process that ends in any way."""
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
    """Whether a process holds this run folder or one in it."""
    return any(_held(path) for path in folder.rglob(f"{FOLDER}/{LOCK}"))


def refuse_used(folder: Path, *results: str) -> None:
    """ConfigError where the run folder already holds one of these results of an earlier run."""
    found = [name for name in results if (folder / name).exists()]
    if found:
        raise ConfigError(f"out={folder} already holds {' and '.join(found)}; choose another out or remove them")


def remove(path: Path) -> None:
    """Removes a file or folder, whether or not it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse_strange(folder: Path) -> None:
    """RunError where the state would not be in the run folder, or its lock is none."""
    root, lock = folder / FOLDER, folder / FOLDER / LOCK
    try:
        if root.is_symlink():
            raise RunError(f"{root} is a link to elsewhere; remove it, or choose another out")
        if lock.exists() and not lock.is_file():
            raise RunError(f"{lock} is no file; remove it, or choose another out")
    except OSError as error:
        raise RunError(f"out={folder} cannot be written ({error.strerror}); choose another out") from error


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"out={folder} is in use by another run; wait for that to end, or choose another out") from None
    except OSError as error:  # of file systems that have no locks
        log.warning("%s cannot be locked: %s", folder, error)


def _held(path: Path) -> bool:
    if not path.is_file():  # a pipe would wait for somebody to read it
        return False
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
