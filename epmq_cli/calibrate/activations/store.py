"""Where activations wait for their next turn: in memory up to a budget, in files beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from epmq_cli.errors import RunError
from epmq_cli.runtime.memory import give_back

HOLES = 1 << 26  # bytes that are not worth the time to find them


class ActivationStore:
    """Room for `budget` bytes in memory, and for the rest in files of a folder of its own under `folder`, which is
    removed when the depot is closed, as it is at the end of a with statement.

    What comes while there is room stays in memory, whatever has waited longest: a walk goes round through the same
    batches, so that what was used last is what is wanted last. `taken`: the bytes that the process has; there is room
    as long as these are no more than the budget above what they were in the beginning, holes between tensors included.
    """

    def __init__(self, budget: float, folder: Path | None = None, taken: Callable[[], int] = lambda: 0) -> None:
        self._budget, self._folder = budget, folder
        self._taken, self._limit, self._trimmed = taken, taken() + budget, 0
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0
        self.used = 0
        """Bytes that wait in memory."""
        self.spilled = 0
        """Bytes that were written to files so far."""

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *error: object) -> None:
        if self._files is not None:
            self._files.cleanup()

    def offload(self, tensors: Iterable[Tensor]) -> OffloadHandle:
        """Keeps these tensors, which must not be touched before they are unpacked. Those that share memory with one
        another are kept once; with anything else they must not share it."""
        handle, full = OffloadHandle(self), self._full()
        for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values():
            size = storage.nbytes()
            if self.used + size <= self._budget and not full:
                self.used += size
                handle.kept += size
            elif size:
                handle.spilled.append((storage, size, self._spill(storage)))
        return handle

    def hold(self, size: int) -> bool:
        """Whether there is room for so many bytes more, which then count as used until they are released."""
        if self.used + size > self._budget or self._full():
            return False
        self.used += size
        return True

    def release(self, size: int) -> None:
        """Gives back bytes that were held."""
        self.used -= size

    def _full(self) -> bool:
        """Whether the process has more than it should, even without the holes that the system can take back."""
        if (found := self._taken()) > max(self._limit, self._trimmed + HOLES):
            give_back()
            found = self._trimmed = self._taken()
        return found > self._limit

    def _spill(self, storage: torch.UntypedStorage) -> Path:
        self._count += 1
        try:
            if self._files is None:
                self._files = tempfile.TemporaryDirectory(prefix=".activations-", dir=self._folder)
            path = Path(self._files.name) / str(self._count)
            _bytes(storage).to("cpu", copy=True).numpy().tofile(path)  # storages that numpy has seen cannot be resized
        except OSError as error:
            raise RunError(
                f"{self._folder or tempfile.gettempdir()} has no room for activations ({error.strerror or error}); "
                "make room there or raise calib.memory, and start the same command again"
            ) from error
        self.spilled += storage.nbytes()
        storage.resize_(0)
        return path


class OffloadHandle:
    """Tensors that wait: how many bytes of them in memory, and which storages in which files."""

    def __init__(self, store: ActivationStore) -> None:
        self._depot = store
        self.kept = 0
        self.spilled: list[tuple[torch.UntypedStorage, int, Path]] = []

    def load(self) -> None:
        """Makes the tensors what they were."""
        self._depot.used -= self.kept
        for storage, size, path in self.spilled:
            storage.resize_(size)
            _bytes(storage).copy_(torch.from_file(str(path), size=size, dtype=torch.uint8))
            path.unlink()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
