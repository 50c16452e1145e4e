"""Samples, which data sources return: inputs for the base model's processor, and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "test"]


class View(Sequence[Any]):
    """A selection of inputs in a new order; each is fetched, and an image decoded, on access."""

    def __init__(self, inputs: Sequence[Any], indices: Sequence[int]) -> None:
        self._inputs, self._indices = inputs, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Any]:
        return (self._inputs[index] for index in self._indices)

    def __getitem__(self, position: int) -> Any:  # type: ignore[override]
        return self._inputs[self._indices[position]]

    def raw(self, position: int) -> Any:
        """The input in its stored form."""
        return raw(self._inputs, self._indices[position])


def raw(inputs: Sequence[Any], position: int) -> Any:
    """An input in its stored form, such as the bytes of an image, if the sequence has a method `raw`; otherwise the
    input itself."""
    own = getattr(inputs, "raw", None)
    return inputs[position] if own is None else own(position)


@dataclass(frozen=True)
class Samples:
    """One split of one task.

    `inputs`: images as PIL images, texts as str, pairs of texts as (str, str). `labels`: (len(inputs),), int64 indices
    of the task's classes, or float32 for a regression; None if the source has none, which suffices for calibration and
    perplexity. `classes`: the source's names of the labels 0, 1, ..., such as those of class folders; None if it has
    none. `references`: the texts that generated ones are compared with, in place of labels.
    """

    inputs: Sequence[Any]
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    references: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: list[int]) -> Samples:
        """The samples at these positions, in this order; images are read on access."""
        labels = None if self.labels is None else self.labels[indices]
        references = None if self.references is None else [self.references[index] for index in indices]
        return Samples(View(self.inputs, indices), labels, self.classes, references)

    def some(self, count: int | None, seed: int | None) -> Samples:
        """The first `count` samples, or with a seed `count` in random order; all without a count or if there are fewer.

        The order depends only on the seed and the number of samples, so a longer draw begins with a shorter one.
        """
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            return self.take(torch.randperm(len(self), generator=generator)[:count].tolist())
        return self if count is None or count >= len(self) else self.take(list(range(count)))

    def stratified(self, count: int | None, seed: int) -> Samples:
        """`count` samples drawn by the seed, in stored order; all without a count or if there are fewer.

        Each class gets its share, to within one sample. Regressions and samples without labels are drawn at random. A
        longer draw contains a shorter one.
        """
        if count is None or count >= len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        if self.labels is not None and not self.labels.is_floating_point():
            order = order[torch.argsort(quantiles(self.labels[order]), stable=True)]
        return self.take(order[:count].sort().values.tolist())

    def by_length(self) -> Samples:
        """Texts, or their tokens, sorted from short to long, which reduces padding; images unchanged."""
        return self.take(self.order_by_length()) if self._texts else self

    def order_by_length(self) -> list[int]:
        """The positions of texts, or of their tokens, from short to long; of images in their order."""
        places = list(range(len(self)))
        return sorted(places, key=lambda i: _length(self.inputs[i])) if self._texts else places

    @property
    def _texts(self) -> bool:
        return len(self) > 0 and isinstance(self.inputs[0], (str, tuple, torch.Tensor))


def _length(text: str | tuple[str, ...] | Tensor) -> int:
    """Letters of a text or of a pair, or tokens."""
    return sum(map(len, text)) if isinstance(text, tuple) else len(text)


def quantiles(labels: Tensor) -> Tensor:
    """(samples,): the position of each sample among those with the same label, from 0 to 1. `labels`: (samples,).

    The samples below any quantile hold each label in proportion.
    """
    result = torch.empty(len(labels), dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        own = (labels == label).nonzero()[:, 0]
        result[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
    return result


class Source(Protocol):
    """A data source: one frozen dataclass for each kind of storage. It may also be a `CheckedSource`."""

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Up to `count` samples of the split: the first ones, or with a seed in random order that depends on the seed
        alone; without a count all. Labels of the train split are never used. DataError if samples cannot be read."""


@runtime_checkable
class CheckedSource(Protocol):
    """A source whose first samples can be checked before torch is imported, which takes seconds."""

    def check_first(self, split: Split) -> int:
        """How many samples were read of the split; 0 only if it has none. DataError as in `load` if they cannot be
        read. Reads a small part of a large file, and does not use torch."""
