"""What a data source returns: inputs as the processor of the base model takes them, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Samples:
    """One split of one task.

    `inputs`: images as PIL images, texts as str, pairs of texts as (str, str). `labels`: int64 (len(inputs),), indices
    into the task's classes.
    """

    inputs: Sequence[Any]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: list[int]) -> Samples:
        """The samples at these positions, in this order."""
        return Samples([self.inputs[i] for i in indices], self.labels[indices])

    def by_length(self) -> Samples:
        """Texts from short to long, so that batches hold little padding; images as they are."""
        if len(self) == 0 or not isinstance(self.inputs[0], (str, tuple)):
            return self
        return self.take(sorted(range(len(self)), key=lambda i: sum(map(len, self.inputs[i]))))


class Source(Protocol):
    """Where the samples of a task come from: one frozen dataclass a kind of place."""

    def load(self, split: Split) -> Samples:
        """All samples of the split; DataError where they cannot be read."""
