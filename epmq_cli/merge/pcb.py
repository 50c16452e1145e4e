"""PCB: weighs each element of a task vector by its size and by its agreement with the other tasks, and drops those of
low weight (Du et al. 2024, https://arxiv.org/abs/2410.02396, section 3.2; the quantiles are those of the authors' code,
https://github.com/duguodong7/pcb-merging).

The quantiles are over the whole task vectors and exact. They take four passes over the models, with one tensor in
memory at a time. Where the reference divides zero by zero, because all elements are equal, the weights here are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece, PieceReader
from epmq_cli.merge.parameters import Number, Parameters, PerTensor
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.ties import magnitudes_of_rank
from epmq_cli.runtime.progress import track

if TYPE_CHECKING:
    from torch import Tensor

OUTLIERS = 0.0001
"""The part of the elements at either end of the magnitudes that is clipped."""

Ranges = list[tuple[float, float]]
"""The smallest and the largest value of each task, after clipping."""


def normalized(values: Tensor, low: float, high: float) -> Tensor:
    """Values clipped to [low, high] and mapped to [0, 1]; zero if both are equal."""
    return (values.clamp(low, high) - low) / (high - low) if high > low else torch.zeros_like(values)


def balances(vectors: Sequence[Tensor], sizes: Ranges) -> list[Tensor]:
    """The weights of the elements (n,) of each task vector before low ones are dropped: exp of the number of tasks
    times the squared normalized size, times tanh of the product with the sum of all task vectors."""
    total = torch.stack(list(vectors)).sum(0)
    return [
        (len(vectors) * normalized(vector.abs(), *size).square()).exp() * (vector * total).tanh()
        for vector, size in zip(vectors, sizes, strict=True)
    ]


def merged(vectors: Sequence[Tensor], sizes: Ranges, weights: Ranges) -> Tensor:
    """The weighted mean of the clipped task vectors (n,); zero where every weight is."""
    total, share = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for vector, balance, size, weight in zip(vectors, balances(vectors, sizes), sizes, weights, strict=True):
        scale = normalized(balance, *weight)
        total += vector.sign() * vector.abs().clamp(*size) * scale
        share += scale
    return total / share.clamp(min=1e-12)


def order_statistics(
    source: MergeSource, read: Callable[[Piece], Sequence[Tensor]], places: Sequence[Callable[[int], int]]
) -> list[list[float]]:
    """For each task and each place, the value at that place of the task's values in ascending order. `places` give an
    index for a length. Reads all models twice: values above 0 are counted by magnitude, and so are those below 0."""
    count = len(places)

    def values(reader: PieceReader) -> list[Tensor]:
        signed = [half for row in read(reader()) for half in (row.clamp(min=0), (-row).clamp(min=0))]
        return [half for half in signed for _ in places]

    def passes() -> Iterator[list[Callable[[], list[Tensor]]]]:
        for name in track(source.names, "find the quantiles"):
            yield [partial(values, reader) for reader in source.pieces(name)]

    def rank(vector: int, length: int) -> int:
        place = places[vector % count](length)
        return length - place if vector // count % 2 == 0 else place + 1

    found = torch.tensor(magnitudes_of_rank(passes, 2 * count * len(source.tasks), rank)).view(-1, 2, count)
    statistics: list[list[float]] = torch.where(found[:, 0] > 0, found[:, 0], -found[:, 1]).tolist()
    return statistics


@dataclass(frozen=True)
class Pcb(Parameters):
    """`merge=pcb`.

    `pcb_ratio`: the fraction of each task vector that is kept, in (0, 1]. `scale`: factor on the merged task vector.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    pcb_ratio: Annotated[float, Number(0, 1, open_low=True)]
    scale: Annotated[Setting, PerTensor(0, 10)]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Reads all models four times: twice for the range of magnitudes, twice for that of the weights."""
        ends = (lambda n: int(n * OUTLIERS), lambda n: _last(n, OUTLIERS))
        sizes = _ranges(order_statistics(source, lambda piece: [v.abs() for v in _vectors(piece)], ends))
        kept = (lambda n: min(int(n * (1 - self.pcb_ratio)), n - 1), lambda n: n - 1)
        weights = _ranges(order_statistics(source, lambda piece: balances(_vectors(piece), sizes), kept))
        scales = source.setting(self.scale, 1.0)
        return ElementwiseRule(
            lambda piece: piece.base + scales.at(piece.name) * merged(_vectors(piece), sizes, weights)
        )


def _last(length: int, ratio: float) -> int:
    """The index of the largest value below the part `ratio` of the largest ones."""
    return max(0, int(length * (1 - ratio) - 1))


def _ranges(statistics: list[list[float]]) -> Ranges:
    return [(low, max(low, high)) for low, high in statistics]


def _vectors(piece: Piece) -> list[Tensor]:
    return list(piece.task_vectors().values())
