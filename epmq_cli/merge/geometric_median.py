"""Geometric median: for each tensor, the point with the smallest sum of distances to the experts, by Weiszfeld's
iteration (Weiszfeld 1937, https://doi.org/10.1007/s10479-008-0352-z; for models Pillutla et al. 2022,
https://arxiv.org/abs/1912.13445).

Each iterate is a mean of the experts with some weights, so the iteration needs only the distances between experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.average import check_sums
from epmq_cli.merge.gram import combination, gram
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Number, Parameters, Weight
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor

NEAREST = 1e-6  # of the largest distance: closer experts count as if they were so far away


def median_weights(products: Tensor, weights: Tensor, max_iter: int, tol: float) -> Tensor:
    """(n,): weights that sum to 1, with which the mean of n vectors is their geometric median. `products` (n, n): their
    inner products in float64. `weights` (n,): how often each vector counts."""
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp(min=0)  # squared
    floor = NEAREST * distances.max().sqrt()
    shares = weights / weights.sum()
    if floor == 0:
        return shares
    for _ in range(max_iter):
        to_mean = (distances @ shares - shares @ distances @ shares / 2).clamp(min=0).sqrt()
        pulls = weights / to_mean.clamp(min=floor)
        new = pulls / pulls.sum()
        change, shares = (new - shares).abs().max(), new
        if change < tol:
            break
    return shares


@dataclass(frozen=True)
class GeometricMedian(Parameters):
    """`merge=geometric_median`.

    `max_iter`: the largest number of steps. `tol`: the change of an expert's share at which they end. `weights`:
    factors on the distances by task, a setting.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    max_iter: Annotated[int, Number(1, 1_000_000, integer=True)]
    tol: Annotated[float, Number(0, 1, open_low=True)]
    weights: Annotated[Setting, Weight()]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model. The rule holds one tensor of all experts.
        ConfigError if all weights of a tensor are 0."""
        weights = source.setting(self.weights, 1.0)
        check_sums(weights, source)

        def merge(name: str, base: Tensor, experts: Mapping[str, Tensor]) -> Tensor:
            vectors = [experts[task] - base for task in experts]
            own = torch.tensor([weights.at(name, task) for task in experts], dtype=torch.float64)
            shares = median_weights(gram(vectors), own, self.max_iter, self.tol)
            return base + combination(shares.tolist(), vectors)

        return TensorRule(merge)
