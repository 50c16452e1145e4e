"""TIES: trim, elect sign, disjoint merge (Yadav et al. 2023, https://arxiv.org/abs/2306.01708, section 3, algorithm 1).

Trimming is over the whole task vector, as in the paper, not tensor by tensor. Two passes over the models find the exact
thresholds by counting float bits, with one tensor in memory at a time. A third pass finds the majority of signs over
the whole vector, which the paper's code elects for elements whose task vectors cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece, PieceReader
from epmq_cli.merge.parameters import Choice, Number, Parameters, PerTensor
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource
from epmq_cli.runtime.console import track
from epmq_cli.runtime.threads import spread, threads

Count = Callable[[int, np.ndarray, np.ndarray], None]
"""Adds the counts of a piece of the k-th vector to a table (65536,)."""

Vectors = Callable[[], list[Tensor]]
"""Reads one piece of every vector, flat in float32."""

Passes = Callable[[], Iterable[list[Vectors]]]
"""Starts a pass over the pieces of all vectors, tensor by tensor."""


def kth_largest_magnitudes(passes: Passes, vectors: int, density: float) -> list[float]:
    """For each vector, the smallest of its int(density * N) largest magnitudes, at least one, where N is its length."""
    return magnitudes_of_rank(passes, vectors, lambda _, length: max(1, int(density * length)))


def magnitudes_of_rank(passes: Passes, vectors: int, rank_of: Callable[[int, int], int]) -> list[float]:
    """For each vector, its `rank`-th largest magnitude, where `rank_of` gives the rank for its index and its length.

    `passes()` yields the same pieces of all vectors, tensor by tensor, each time it is called. Magnitudes are ordered
    like their bit patterns read as integers: the first pass counts the upper 16 bits, the second the lower 16 within
    the bin that holds the answer.
    """
    from epmq_cli.merge.kernels import count_lower, count_upper

    upper = _counted(passes(), vectors, lambda k, values, counts: count_upper(values, counts))
    length = int(upper[0].sum())
    bins = [_bin_from_top(counts, rank_of(k, length)) for k, counts in enumerate(upper)]
    lower = _counted(passes(), vectors, lambda k, values, counts: count_lower(values, bins[k][0], counts))
    bits = [high << 16 | _bin_from_top(counts, rest)[0] for counts, (high, rest) in zip(lower, bins, strict=True)]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()


def _counted(tensors: Iterable[list[Vectors]], vectors: int, count: Count) -> Tensor:
    """(vectors, 65536): the counts of all pieces."""
    own = np.zeros((threads(), vectors, 1 << 16), np.int64)  # one table for each thread: two threads would lose counts

    def work(thread: int, pieces: list[Vectors]) -> None:
        for piece in pieces[thread :: len(own)]:
            for k, values in enumerate(piece()):
                count(k, values.numpy(), own[thread, k])

    for pieces in tensors:
        spread(partial(work, pieces=pieces), range(min(len(own), len(pieces))))
    return torch.from_numpy(own.sum(0))


def _bin_from_top(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the `rank`-th largest element, and its rank from the top within that bin."""
    from_top = counts.flip(0).cumsum(0)
    steps = int(torch.searchsorted(from_top, rank))
    above = int(from_top[steps - 1]) if steps else 0
    return len(counts) - 1 - steps, rank - above


def elected(
    base: Tensor, experts: Sequence[Tensor], thresholds: list[float], majority: float, scale: float, mean: bool
) -> Tensor:
    """Trims, elects and merges (n,) elements: base plus `scale` times the sum or the mean of the task vectors that
    agree with the elected sign, where values below a task vector's threshold count as 0.

    The elected sign is the sign of the sum. Where the sum is zero and its terms are not, it is `majority`, +1 or -1.
    """
    from epmq_cli.merge.kernels import elect

    merged, options = torch.empty_like(base), (np.float32(majority), np.float32(scale), mean)
    elect(base.numpy(), torch.stack(list(experts)).numpy(), np.array(thresholds, np.float32), *options, merged.numpy())
    return merged


def sign_sum(base: Tensor, experts: Sequence[Tensor], thresholds: list[float]) -> int:
    """The sum of the signs of the sums of the trimmed task vectors."""
    from epmq_cli.merge.kernels import sum_signs

    signs = np.zeros(1, np.int64)
    sum_signs(base.numpy(), torch.stack(list(experts)).numpy(), np.array(thresholds, np.float32), signs)
    return int(signs[0])


def majority_sign(source: MergeSource, signs: Callable[[Piece], int]) -> float:
    """The sign, +1 or -1, of most elements of the sum of the trimmed task vectors. `signs`: the sum of the signs of a
    piece."""

    def read(reader: PieceReader) -> int:
        return signs(reader())

    names = track(source.names, "find the majority of signs")
    return 1.0 if sum(sum(spread(read, source.pieces(name))) for name in names) >= 0 else -1.0


@dataclass(frozen=True)
class Ties(Parameters):
    """`merge=ties`.

    `density`: the fraction of each task vector that is kept, in (0, 1]. `scale`: factor on the merged task vector.
    `combine`: the `sum` of the agreeing values (FusionBench, with scale 0.3) or their `mean` (the paper, with scale 1).
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    density: Annotated[float, Number(0, 1, open_low=True)]
    scale: Annotated[Setting, PerTensor(0, 10)]
    combine: Annotated[str, Choice(("sum", "mean"))]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Reads all models three times: twice for the thresholds, once for the majority of signs."""

        thresholds = trim_thresholds(source, self.density)
        majority = majority_sign(source, lambda piece: sign_sum(piece.base, [*piece.experts.values()], thresholds))

        scales = source.setting(self.scale, 1.0)

        def merge(piece: Piece) -> Tensor:
            experts, scale = [*piece.experts.values()], scales.at(piece.name)
            return elected(piece.base, experts, thresholds, majority, scale, self.combine == "mean")

        return ElementwiseRule(merge)


def trim_thresholds(source: MergeSource, density: float) -> list[float]:
    """For each task vector, the smallest magnitude of the part `density` of its elements that is kept."""

    def passes() -> Iterator[list[Vectors]]:
        for name in track(source.names, "find the thresholds"):
            yield [partial(_task_vectors, reader) for reader in source.pieces(name)]

    return kth_largest_magnitudes(passes, len(source.tasks), density)


def _task_vectors(reader: PieceReader) -> list[Tensor]:
    return [*reader().task_vectors().values()]
