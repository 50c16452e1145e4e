"""Halves the micro-batch and retries on out-of-memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from epmq_cli.data.batching import ALL, Batch, size, split
from epmq_cli.errors import RunError, first_line, lacks_memory
from epmq_cli.runtime import memory
from epmq_cli.runtime.console import log, say

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")


class MicroBatcher:
    """The number of samples that go through a model at a time: `most` at first, and half as many after each
    out-of-memory error.

    `work` and `remedy` are for messages: the work that needs the memory, and what to do if one sample is too many.
    `retries`: whether smaller micro-batches are tried at all.
    """

    def __init__(self, most: int, work: str, remedy: str, retries: bool = True) -> None:
        self.most, self.samples = most, most
        self.halved = 0
        """The number of halvings of the micro-batch, including earlier processes of the run."""
        self.keep: Callable[[int], None] = lambda halved: None
        """Called with the new count after each halving."""
        self._work, self._remedy, self._retries = work, remedy, retries

    def run(
        self, call: Callable[[int], Result], restore: Callable[[], None] = lambda: None, count: int = ALL
    ) -> Result:
        """The result of `call`, which receives the number of samples per micro-batch.

        `restore` undoes what a failed call has changed. `count`: the maximum number of samples. RunError if one sample
        does not fit into memory.
        """
        while True:
            samples = min(self.samples, count)
            try:
                return call(samples)
            except (MemoryError, RuntimeError) as error:
                if not (self._retries and lacks_memory(error)):
                    raise
                log.info("%s, %d samples at a time: %s", self._work, samples, first_line(error))
            self._halve(samples)  # outside of the except block, where the error no longer holds the call's tensors
            restore()

    def rows(self, call: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """The results of `call` for the parts of a batch, concatenated."""
        return self.run(lambda n: joined([call(part) for part in split(batch, n)]), count=size(batch))

    def _halve(self, samples: int) -> None:
        """Halves the micro-batch; RunError if it is one sample."""
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        memory.give_back()
        if samples == 1:
            raise RunError(
                f"there is not enough memory for {self._work}, even with one sample at a time; {self._remedy}"
            )
        self.samples = samples // 2
        self.halved += 1
        short = f"there is not enough memory for {self._work} with {samples} samples at a time"
        say(f"{short}; epmq retries with {self.samples}")
        self.keep(self.halved)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The tensors concatenated along rows; a single tensor unchanged."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
