"""What is done where there is no room for a batch: its samples go through the model in smaller parts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from epmq_cli.data.batching import ALL, Batch, size, split
from epmq_cli.errors import RunError, first_line, lacks_memory
from epmq_cli.runtime import memory
from epmq_cli.runtime.console import log, say

Result = TypeVar("Result")


class MicroBatcher:
    """How many samples may go through a model at a time: at most `most`, half as many each time that memory does not
    suffice.

    `work`: what is done with them, and `remedy`: what to do where there is no room for one of them, as a person reads
    it. `retries`: whether less is tried at all.
    """

    def __init__(self, most: int, work: str, remedy: str, retries: bool = True) -> None:
        self.most, self.samples = most, most
        self.halved = 0
        """How often, earlier processes of a run included."""
        self.keep: Callable[[int], None] = lambda halved: None
        """Called with the count whenever it grows."""
        self._work, self._remedy, self._retries = work, remedy, retries

    def run(
        self, call: Callable[[int], Result], restore: Callable[[], None] = lambda: None, count: int = ALL
    ) -> Result:
        """What `call` gives, told how many samples it may take at a time. `restore`: makes good what a call has changed
        before it failed. `count`: how many there are at most. RunError where there is no room for one."""
        while True:
            samples = min(self.samples, count)
            try:
                return call(samples)
            except (MemoryError, RuntimeError) as error:
                if not (self._retries and lacks_memory(error)):
                    raise
                log.info("%s, %d samples at a time: %s", self._work, samples, first_line(error))
            self._halve(samples)  # out here, where the error no longer holds what the call had made
            restore()

    def rows(self, call: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """What `call` gives for the samples of a batch, one under the other."""
        return self.run(lambda n: joined([call(part) for part in split(batch, n)]), count=size(batch))

    def _halve(self, samples: int) -> None:
        """Half of so many, for which there was no room."""
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        memory.give_back()
        if samples == 1:
            raise RunError(f"there is no room for {self._work} even with one sample at a time; {self._remedy}")
        self.samples = samples // 2
        self.halved += 1
        say(f"there is no room for {self._work} with {samples} samples at a time; it goes on with {self.samples}")
        self.keep(self.halved)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of some tensors, one under the other; the tensor itself where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
