"""Stores activations between their uses: in memory up to a budget, in files beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import RunError
from epmq_cli.runtime.memory import give_back

if TYPE_CHECKING:
    from torch import Tensor

HOLES = 1 << 26  # bytes of fragmentation that are not worth the time to trim them


class ActivationStore:
    """Holds `budget` bytes in memory, and the rest in files of a temporary folder under `folder`, which the end of the
    with statement removes.

    Tensors stay in memory while the budget lasts; none is evicted later, because a walk visits the same batches in
    turn, so the most recently used tensors are needed last. `taken`: returns the bytes that the process uses. The store
    is full when these exceed their initial value by more than the budget, fragmentation included.
    """

    def __init__(self, budget: float, folder: Path | None = None, taken: Callable[[], int] = lambda: 0) -> None:
        self._budget, self._folder = budget, folder
        self._taken, self._limit, self._trimmed = taken, taken() + budget, 0
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0
        self.used = 0
        """The bytes of stored tensors in memory."""
        self.spilled = 0
        """The bytes written to files so far."""

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *error: object) -> None:
        if self._files is not None:
            self._files.cleanup()

    def offload(self, tensors: Iterable[Tensor]) -> OffloadHandle:
        """Stores these tensors, which must not be used until they are loaded. Tensors that share memory are stored
        once; no other tensor may share it."""
        handle, full = OffloadHandle(self), self._full()
        for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values():
            size = storage.nbytes()
            if self.used + size <= self._budget and not full:
                self.used += size
                handle.in_memory += size
            elif size:
                handle.spilled.append((storage, size, self._spill(storage)))
        return handle

    def hold(self, size: int) -> bool:
        """Reserves bytes until they are released. Returns whether the budget allows it."""
        if self.used + size > self._budget or self._full():
            return False
        self.used += size
        return True

    def release(self, size: int) -> None:
        """Releases reserved bytes."""
        self.used -= size

    def _full(self) -> bool:
        """Whether the process exceeds its limit, even after the system reclaims free memory."""
        if (size := self._taken()) > max(self._limit, self._trimmed + HOLES):
            give_back()
            size = self._trimmed = self._taken()
        return size > self._limit

    def _spill(self, storage: torch.UntypedStorage) -> Path:
        self._count += 1
        try:
            if self._files is None:
                self._files = tempfile.TemporaryDirectory(prefix=".activations-", dir=self._folder)
            path = Path(self._files.name) / str(self._count)
            _bytes(storage).to("cpu", copy=True).numpy().tofile(path)  # storages that numpy has seen cannot be resized
        except OSError as error:
            raise RunError(
                f"{self._folder or tempfile.gettempdir()} has no space for activations ({error.strerror or error}); "
                "free some space there or raise calib.memory, and start the same command again"
            ) from error
        self.spilled += storage.nbytes()
        storage.resize_(0)
        return path


class OffloadHandle:
    """A handle of offloaded tensors: their bytes in memory, and the files of spilled storages."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self.in_memory = 0
        self.spilled: list[tuple[torch.UntypedStorage, int, Path]] = []

    def load(self) -> None:
        """Restores the tensors."""
        self._store.used -= self.in_memory
        for storage, size, path in self.spilled:
            storage.resize_(size)
            _bytes(storage).copy_(torch.from_file(str(path), size=size, dtype=torch.uint8))
            path.unlink()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
