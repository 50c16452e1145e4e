"""The progress of an unfinished run, in `.resume/<key>` of its folder.

The key is a hash of all that the result depends on (keys.py). A run with another key does not touch this progress; the
run that completes the folder removes all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from epmq_cli.calibrate.progress import Account, WalkProgress
from epmq_cli.calibrate.progress_file import write_error, write_tensors
from epmq_cli.errors import RunError
from epmq_cli.pipeline.keys import differences, short
from epmq_cli.pipeline.unfinished import PACKING
from epmq_cli.runtime import distributed
from epmq_cli.runtime.console import say
from epmq_cli.runtime.paths import read_regular
from epmq_cli.store.atomic import write_text
from epmq_cli.store.run_lock import FOLDER, remove

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IDENTITY = "identity.json"
STARTS = "starts"
SHOWN = 3  # differences of two runs

Value = TypeVar("Value")


class RunProgress:
    """The progress of a run, or of a part of it, in a folder. Without a folder nothing is stored.

    Of several processes, the main one reads and writes, and broadcasts to the others.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path | None:
        """The folder; None if nothing is stored."""
        return self._folder

    def part(self, name: str | None) -> RunProgress:
        """The progress of a part. A part without a name is not stored."""
        return RunProgress(None if self._folder is None or name is None else self._folder / name)

    def of_walk(self, name: str, account: Account | None = None) -> WalkProgress:
        """The progress of a walk."""
        return WalkProgress(self._folder and self._folder / name, account)

    def value(self, name: str, make: Callable[[], Value]) -> Value:
        """The JSON value that `make` returns, or returned in an earlier process."""
        if self._folder is None:
            return make()
        path = self._folder / f"{name}.json"
        values: list[Value] = [_read(path)] if distributed.is_main() and path.is_file() else []
        for value in distributed.broadcast(values):
            return value
        value = make()
        if distributed.is_main():
            _write(path, value)
        return value

    def finished(self, name: str, make: Callable[[], Value]) -> Value:
        """The `value` of a part. The part's own progress is removed afterwards."""
        value = self.value(name, make)
        if self._folder is not None and distributed.is_main():
            remove(self._folder / name)
        return value

    def tensors(self, name: str, device: torch.device, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that `make` returns, or returned in an earlier process of the same rank, on the device."""
        if self._folder is None:
            return make()
        path = self._folder / f"{name}-{distributed.rank()}.safetensors"
        if path.is_file():
            try:
                from safetensors.torch import load_file  # imports torch

                tensors: dict[str, Tensor] = load_file(path, device=str(device))
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error
            return tensors
        tensors = make()
        write_tensors(path, tensors, None)
        return tensors

    @property
    def starts(self) -> int:
        """How many times the run was started before, by one process or by one group of processes."""
        return self._counted(STARTS) if self._folder else 0

    def count(self, name: str) -> int:
        """The count of this name; 0 if there is none."""
        return self._counted(name) if self.has(f"{name}.json") else 0

    def keep_count(self, name: str, count: int) -> None:
        """Writes the count of this name."""
        if self._folder is not None and distributed.is_main():
            _write(self._folder / f"{name}.json", count)

    def _counted(self, name: str) -> int:
        assert self._folder is not None
        path = self._folder / f"{name}.json"
        count = _read(path)
        if not isinstance(count, int):
            raise _damaged(path, "not a number")
        return count

    def has(self, file: str) -> bool:
        """Whether a file of this name exists."""
        return self._folder is not None and (self._folder / file).is_file()

    def begin_packing(self) -> None:
        """Marks a checkpoint in the folder as this run's. Call it before the checkpoint is written."""
        self.value(PACKING, lambda: True)


def opened(folder: Path, identity: Mapping[str, Any], resume: str) -> RunProgress:
    """The progress of the run with this identity: an earlier process's, or new. `resume=never` always starts a new one.
    Every process must call this, with the main process's identity."""
    place = folder / FOLDER / short(identity)
    if len(set(distributed.all_gather(short(identity.get("config"))))) > 1:
        raise RunError("the processes of this run have different configs; start all of them with the same command")
    if distributed.is_main():
        if resume == "never":
            for path in (folder / FOLDER).glob("*/"):
                remove(path)
        _announce(folder, place, identity)
        progress = RunProgress(place)
        progress.keep_count(STARTS, progress.starts + 1 if progress.has(IDENTITY) else 0)
        _write(place / IDENTITY, identity)
    place = Path(distributed.broadcast(str(place.resolve())))
    if not all(distributed.all_gather(place.is_dir())):
        say(
            "not all processes see the run folder, so no progress is kept; after an interruption, the run starts from "
            "the beginning"
        )
        return RunProgress()
    return RunProgress(place)


def _announce(folder: Path, place: Path, identity: Mapping[str, Any]) -> None:
    if (place / IDENTITY).is_file():
        say(f"{folder} was interrupted; the run continues after the last finished block")
        return
    for other in sorted((folder / FOLDER).glob(f"*/{IDENTITY}")):
        changes = list(differences(_identity(other), identity))
        more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        say(
            f"{folder} holds an interrupted run that differs ({', '.join(changes[:SHOWN])}{more}); this run starts "
            "from the beginning"
        )


def close(folder: Path) -> None:
    """Removes the progress from a complete run folder."""
    remove(folder / FOLDER)


def _identity(path: Path) -> Mapping[str, Any]:
    identity = _read(path)
    if not isinstance(identity, dict):
        raise _damaged(path, "not a JSON object")
    return identity


def _read(path: Path) -> Any:
    try:
        return json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> RunError:
    if isinstance(reason, PermissionError):
        return RunError(f"{path} cannot be read ({reason.strerror}); change its permissions, or choose another out")
    return RunError(f"{path} is damaged ({reason}); start from the beginning with resume=never")


def _write(path: Path, content: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content) + "\n")
    except OSError as error:
        raise write_error(path, error) from error
