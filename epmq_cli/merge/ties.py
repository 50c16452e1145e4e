"""TIES: trim, elect sign, disjoint merge (Yadav et al. 2023, https://arxiv.org/abs/2306.01708, section 3, algorithm 1).

Trimming is over the whole task vector, as in the paper, not tensor by tensor. The thresholds are exact and found in two
passes over the tensors by counting float bits, so that no more than one tensor is in memory; a third pass finds the
majority of signs over the whole vector, by which the paper's code elects where task vectors cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from epmq_cli.config.validate import check_choice, check_range
from epmq_cli.merge.source import ElementwiseRule, MergeSource, PieceReader
from epmq_cli.runtime.console import track
from epmq_cli.runtime.threads import spread, threads

Count = Callable[[int, np.ndarray, np.ndarray], None]
"""Adds to counts (65536,) those of a piece of the k-th vector."""


def kth_largest_magnitudes(
    passes: Callable[[], Iterable[list[PieceReader]]], vectors: int, density: float
) -> list[float]:
    """Of each vector the smallest magnitude among the int(density * N) largest (at least one) of its N values.

    `passes()` gives the same pieces, flat in float32, of so many vectors each time it is called. Magnitudes order like
    their bit patterns read as integers: the first pass counts the upper 16 bits, the second the lower 16 within the bin
    that holds the answer.
    """
    from epmq_cli.merge.kernels import count_lower, count_upper

    upper = _counted(passes(), vectors, lambda k, values, counts: count_upper(values, counts))
    wanted = max(1, int(density * int(upper[0].sum())))
    bins = [_bin_from_top(counts, wanted) for counts in upper]
    lower = _counted(passes(), vectors, lambda k, values, counts: count_lower(values, bins[k][0], counts))
    found = [high << 16 | _bin_from_top(counts, rest)[0] for counts, (high, rest) in zip(lower, bins, strict=True)]
    return torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist()


def _counted(pieces: Iterable[list[PieceReader]], vectors: int, count: Count) -> Tensor:
    """(vectors, 65536): what `count` adds up over all pieces."""
    own = np.zeros((threads(), vectors, 1 << 16), np.int64)  # by thread, as two at once would lose counts

    def work(thread: int, reads: list[PieceReader]) -> None:
        for read in reads[thread :: len(own)]:
            for k, values in enumerate(read()):
                count(k, values.numpy(), own[thread, k])

    for reads in pieces:
        spread(partial(work, reads=reads), range(min(len(own), len(reads))))
    return torch.from_numpy(own.sum(0))


def _bin_from_top(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th element counted from the top bin, and how many of it are wanted."""
    from_top = counts.flip(0).cumsum(0)
    steps = int(torch.searchsorted(from_top, wanted))
    above = int(from_top[steps - 1]) if steps else 0
    return len(counts) - 1 - steps, wanted - above


def elected(
    base: Tensor, experts: list[Tensor], thresholds: list[float], majority: float, scale: float, mean: bool
) -> Tensor:
    """Base (n,) plus `scale` times the sum or mean, at each position, of those task vectors that agree with the elected
    sign, each trimmed to what reaches its threshold.

    The elected sign is that of the sum; where that is zero and its parts are not it is `majority`, +1 or -1.
    """
    from epmq_cli.merge.kernels import elect

    merged, options = torch.empty_like(base), (np.float32(majority), np.float32(scale), mean)
    elect(base.numpy(), torch.stack(experts).numpy(), np.array(thresholds, np.float32), *options, merged.numpy())
    return merged


def sign_sum(base: Tensor, experts: list[Tensor], thresholds: list[float]) -> int:
    """The signs of the sums of the trimmed task vectors, added up."""
    from epmq_cli.merge.kernels import sum_signs

    signs = np.zeros(1, np.int64)
    sum_signs(base.numpy(), torch.stack(experts).numpy(), np.array(thresholds, np.float32), signs)
    return int(signs[0])


@dataclass(frozen=True)
class Ties:
    """`merge=ties`.

    `density`: fraction of each task vector that is kept, in (0, 1]. `scale`: factor on the merged task vector.
    `combine`: `sum` (FusionBench, with scale 0.3) or `mean` (the paper, with scale 1) of the agreeing values.
    """

    density: float
    scale: float
    combine: str

    def __post_init__(self) -> None:
        check_range("merge.density", self.density, 0, 1, open_low=True)
        check_range("merge.scale", self.scale, 0, 10)
        check_choice("merge.combine", self.combine, ("sum", "mean"))

    def __call__(self, source: MergeSource) -> ElementwiseRule:
        def task_vectors() -> Iterator[list[PieceReader]]:
            for name in track(source.names, "find what TIES keeps"):
                yield [partial(_differences, read) for read in source.parts(name)]

        thresholds = kth_largest_magnitudes(task_vectors, len(source.tasks), self.density)

        def signs(read: PieceReader) -> int:
            base, *experts = read()
            return sign_sum(base, experts, thresholds)

        names = track(source.names, "find the majority of signs")
        majority = 1.0 if sum(sum(spread(signs, source.parts(name))) for name in names) >= 0 else -1.0

        def rule(base: Tensor, experts: list[Tensor]) -> Tensor:
            return elected(base, experts, thresholds, majority, self.scale, self.combine == "mean")

        return rule


def _differences(read: PieceReader) -> list[Tensor]:
    """A piece of every task vector."""
    base, *experts = read()
    return [expert - base for expert in experts]
