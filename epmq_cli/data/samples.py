"""What a data source returns: inputs as the processor of the base model takes them, with their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Split = Literal["train", "test"]


class View(Sequence[Any]):
    """Some of the inputs, in an order of their own; each is fetched, and an image decoded, when it is asked for."""

    def __init__(self, inputs: Sequence[Any], indices: Sequence[int]) -> None:
        self._inputs, self._indices = inputs, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Any]:
        return (self._inputs[index] for index in self._indices)

    def __getitem__(self, position: int) -> Any:  # type: ignore[override]
        return self._inputs[self._indices[position]]

    def raw(self, position: int) -> Any:
        """The input as it is stored."""
        return raw(self._inputs, self._indices[position])


def raw(inputs: Sequence[Any], position: int) -> Any:
    """An input as it is stored, such as the bytes of an image that is not decoded, where the sequence knows how (it has
    a method of this name); the input itself elsewhere."""
    own = getattr(inputs, "raw", None)
    return inputs[position] if own is None else own(position)


@dataclass(frozen=True)
class Samples:
    """One split of one task.

    `inputs`: images as PIL images, texts as str, pairs of texts as (str, str). `labels`: (len(inputs),), int64 indices
    into the task's classes, or float32 where the task is a regression; None where the source has none, which is enough
    for calibration and for perplexity. `classes`: the names of the labels 0, 1, ... as the source knows them, such as
    those of class folders; None where it knows none.
    """

    inputs: Sequence[Any]
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: list[int]) -> Samples:
        """The samples at these positions, in this order; images stay where they are until they are asked for."""
        labels = None if self.labels is None else self.labels[indices]
        return Samples(View(self.inputs, indices), labels, self.classes)

    def some(self, count: int | None, seed: int | None) -> Samples:
        """The first `count` samples, or with a seed `count` in random order; all where there are fewer or no count.

        The order depends on the seed and the number of samples alone, so that a longer draw begins with a shorter one.
        """
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            return self.take(torch.randperm(len(self), generator=generator)[:count].tolist())
        return self if count is None or count >= len(self) else self.take(list(range(count)))

    def stratified(self, count: int | None, seed: int) -> Samples:
        """`count` samples drawn by the seed, in the order in which they are stored; all where there are fewer or no
        count.

        Each class has its share of them, to within one sample, so that a file sorted by label is not cut to its first
        classes. Numbers and samples without labels are drawn at random. A longer draw contains a shorter one.
        """
        if count is None or count >= len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        if self.labels is not None and not self.labels.is_floating_point():
            order = order[torch.argsort(quantiles(self.labels[order]), stable=True)]
        return self.take(order[:count].sort().values.tolist())

    def by_length(self) -> Samples:
        """Texts from short to long, so that batches hold little padding; images as they are."""
        if len(self) == 0 or not isinstance(self.inputs[0], (str, tuple)):
            return self
        return self.take(sorted(range(len(self)), key=lambda i: sum(map(len, self.inputs[i]))))


def quantiles(labels: Tensor) -> Tensor:
    """(samples,): where each sample is among those of its label (samples,), from 0 to 1.

    The samples below any quantile have each label in its share.
    """
    found = torch.empty(len(labels), dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        own = (labels == label).nonzero()[:, 0]
        found[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
    return found


class Source(Protocol):
    """Where the samples of a task come from: one frozen dataclass a kind of place."""

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """`count` samples of the split, or fewer where it has no more: the first ones, or with a seed ones in random
        order that depends on the seed alone. Without a count all. Labels of the train split are never used.
        DataError where the samples cannot be read."""
