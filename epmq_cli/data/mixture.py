"""Data of one task from several sources."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from epmq_cli.config.validate import check_range
from epmq_cli.data.samples import CheckedSource, Samples, Source, Split, raw
from epmq_cli.errors import ConfigError, DataError, literal


class Joined(Sequence[Any]):
    """The inputs of several sources, one after the other; each is fetched on access."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = parts
        self._starts = [0, *itertools.accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> Any:  # type: ignore[override]
        return self._at(position, lambda part, index: part[index])

    def raw(self, position: int) -> Any:
        """The input in its stored form."""
        return self._at(position, raw)

    def _at(self, position: int, take: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        number = bisect_right(self._starts, position) - 1
        return take(self._parts[number], position - self._starts[number])


@dataclass(frozen=True)
class Mixture:
    """Several sources of one task's samples, of one kind.

    `weights`: the share of the calibration samples that each source gives, in any unit; null for equal shares. The test
    split is that of all sources.
    """

    sources: Sequence[Source]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if len(self.sources) < 2 or not all(hasattr(source, "load") for source in self.sources):
            raise ConfigError(
                "data.sources must be two or more sources, each with a _target_ such as epmq_cli.data.table.Table, got "
                f"{literal(list(self.sources))}"
            )
        if self.weights is not None:
            if len(self.weights) != len(self.sources):
                raise ConfigError(
                    f"data.weights must have one number for each of the {len(self.sources)} sources, got "
                    f"{list(self.weights)}"
                )
            for weight in self.weights:
                check_range("data.weights", weight, 0, 1e9, open_low=True)

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Samples of all sources; `count` of the train split are shared out by the weights, and then in random order.
        DataError if the sources disagree about their labels."""
        counts = self.shares(count) if split == "train" else [None] * len(self.sources)
        parts = [
            source.load(split, own, None if seed is None or (split == "test") else seed + number)
            for number, (source, own) in enumerate(zip(self.sources, counts, strict=True))
            if own != 0
        ]
        joined = _join(parts)
        return joined if split == "train" and seed is None else joined.some(count, seed)

    def shares(self, count: int | None) -> list[int | None]:
        """How many of `count` samples each source gives, by largest remainder; None for all."""
        if count is None:
            return [None] * len(self.sources)
        weights = self.weights or [1.0] * len(self.sources)
        exact = [count * weight / sum(weights) for weight in weights]
        given = [int(share) for share in exact]
        order = sorted(range(len(exact)), key=lambda number: given[number] - exact[number])
        for number in order[: count - sum(given)]:
            given[number] += 1
        return list(given)

    def check_first(self, split: Split) -> int:
        """See CheckedSource. A source that cannot be checked counts as one sample."""
        return sum(source.check_first(split) if isinstance(source, CheckedSource) else 1 for source in self.sources)


def _join(parts: Sequence[Samples]) -> Samples:
    classes = {part.classes for part in parts}
    if len(classes) > 1:
        raise DataError(
            f"the sources of a task name their classes differently, {' and '.join(map(literal, classes))}; set "
            "data.labels of each source to the same list"
        )
    labels = [part.labels for part in parts if part.labels is not None]
    whole = len(labels) == len(parts) and len({label.dtype for label in labels}) == 1
    return Samples(Joined([part.inputs for part in parts]), torch.cat(labels) if whole else None, parts[0].classes)
