"""TIES: trim, elect sign, disjoint merge (Yadav et al. 2023, https://arxiv.org/abs/2306.01708, section 3, algorithm 1).

Trimming is over the whole task vector, as in the paper, not tensor by tensor. The threshold is exact and found in two
passes over the tensors by counting float bits, so that no more than one tensor is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from epmq_cli.console import track
from epmq_cli.errors import check_choice, check_range
from epmq_cli.merge.source import MergeSource, Rule


def kth_largest_magnitude(passes: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The smallest magnitude among the int(density * N) largest (at least one) of N values.

    `passes()` gives the same float32 tensors each time it is called. Magnitudes order like their bit patterns read as
    integers: the first pass counts the upper 16 bits, the second the lower 16 within the bin that holds the answer.
    """
    from epmq_cli.merge.ties_loops import count_lower, count_upper

    upper, lower = (torch.zeros(1 << 16, dtype=torch.int64) for _ in range(2))
    for tensor in passes():
        count_upper(tensor.flatten().numpy(), upper.numpy())
    high, wanted = _bin_from_top(upper, max(1, int(density * int(upper.sum()))))
    for tensor in passes():
        count_lower(tensor.flatten().numpy(), high, lower.numpy())
    low, _ = _bin_from_top(lower, wanted)
    return torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32).item()


def _bin_from_top(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th element counted from the top bin, and how many of it are wanted."""
    from_top = counts.flip(0).cumsum(0)
    steps = int(torch.searchsorted(from_top, wanted))
    above = int(from_top[steps - 1]) if steps else 0
    return len(counts) - 1 - steps, wanted - above


def elected(
    base: Tensor,
    experts: list[Tensor],
    thresholds: list[float],
    majority: Callable[[], float],
    scale: float,
    mean: bool,
) -> Tensor:
    """Base (n,) plus `scale` times the sum or mean, at each position, of those task vectors that agree with the elected
    sign, each trimmed to what reaches its threshold.

    The elected sign is that of the sum; where that is zero and its parts are not it is `majority()`, +1 or -1.
    """
    merged, cancelled, _ = _elect(base, experts, thresholds, 1.0, scale, mean)
    if cancelled and majority() < 0:
        merged, _, _ = _elect(base, experts, thresholds, -1.0, scale, mean)
    return merged


def _elect(
    base: Tensor, experts: list[Tensor], thresholds: list[float], majority: float, scale: float, mean: bool
) -> tuple[Tensor, int, int]:
    """The merged elements, how often task vectors cancelled, and the sum of the elected signs where they did not."""
    from epmq_cli.merge.ties_loops import elect

    merged, counts = torch.empty_like(base), np.zeros(2, np.int64)
    limits = np.array(thresholds, np.float32)
    options = (np.float32(majority), np.float32(scale), mean)
    elect(base.numpy(), torch.stack(experts).numpy(), limits, *options, merged.numpy(), counts)
    return merged, int(counts[0]), int(counts[1])


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

    def __call__(self, source: MergeSource) -> Rule:
        thresholds = [
            kth_largest_magnitude(lambda task=task: source.task_vectors(task), self.density)  # type: ignore[misc]
            for task in track(source.tasks, "find what TIES keeps")
        ]

        @cache
        def majority() -> float:
            pieces = (piece for name in source.names for piece in source.parts(name))
            signs = sum(_elect(base, experts, thresholds, 1.0, 1.0, False)[2] for base, *experts in pieces)
            return 1.0 if signs >= 0 else -1.0

        def rule(base: Tensor, experts: list[Tensor]) -> Tensor:
            return elected(base, experts, thresholds, majority, self.scale, self.combine == "mean")

        return rule
