"""SCE: selects elements by their variance over the experts, computes a coefficient for each expert, and erases values
of the minority's sign (Wan et al. 2024, https://arxiv.org/abs/2408.07990, section 3.3).

Coefficients are the shares of the mean squares of the selected elements, as in the paper. In mergekit they are equal if
the mean squares sum to less than 1e-6, as they do for short task vectors. The only expert of a suite is kept whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch

from epmq_cli.merge.gram import CHUNK
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Parameters, PerTensor
from epmq_cli.merge.settings import Setting, TensorSetting
from epmq_cli.merge.source import MergeSource
from epmq_cli.runtime.threads import spread

if TYPE_CHECKING:
    from torch import Tensor

Chunks = list[tuple["Tensor", ...]]
"""The task vectors, in chunks of some of their elements."""


def smallest_variance(chunks: Chunks, select_topk: float) -> tuple[list[Tensor], float]:
    """The variance of each element over the experts, and the smallest one that is selected: the int(select_topk * N)
    largest of N that are not 0."""
    variances = spread(lambda chunk: torch.stack(chunk).double().var(0, correction=0).float(), chunks)
    every = torch.cat(variances).numpy()
    selected = int(select_topk * np.count_nonzero(every))
    if selected == 0:
        return variances, float("inf")
    return variances, float(np.partition(every, len(every) - selected)[len(every) - selected])


def erased(vectors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """The mean of the task vectors by their factors, over those whose sign is that of their sum; + for a sum of 0."""
    total = torch.stack(list(vectors)).sum(0)
    sign = torch.where(total >= 0, 1.0, -1.0)
    merged, share = torch.zeros_like(total), torch.zeros_like(total)
    for vector, factor in zip(vectors, factors, strict=True):
        agrees = factor * (vector * sign > 0)
        merged += agrees * vector
        share += agrees
    return merged / torch.where(share > 0, share, 1.0)


def sce(name: str, base: Tensor, experts: Mapping[str, Tensor], select_topk: TensorSetting) -> Tensor:
    """Base plus the merge of the task vectors."""
    flat = base.flatten()
    vectors = [experts[task].flatten() - flat for task in experts]
    chunks: Chunks = list(zip(*(torch.split(vector, CHUNK) for vector in vectors), strict=True))
    share = select_topk.at(name)
    if share < 1 and len(vectors) > 1:
        variances, least = smallest_variance(chunks, share)
        for chunk, variance in zip(chunks, variances, strict=True):
            for part in chunk:
                part *= variance >= least
        del variances
    squares = torch.stack(spread(lambda chunk: torch.stack(chunk).double().square().sum(1), chunks)).sum(0)
    total = float(squares.sum())
    factors = (squares / total).tolist() if total > 0 else [1 / len(vectors)] * len(vectors)
    return base + torch.cat(spread(lambda chunk: erased(chunk, factors), chunks)).view(base.shape)


@dataclass(frozen=True)
class Sce(Parameters):
    """`merge=sce`: `select_topk` is the part of the elements that differ between experts that is kept, a setting; those
    of the largest variance."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    select_topk: Annotated[Setting, PerTensor(0, 1, open_low=True)]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model. The rule holds one tensor of all experts, up to twice."""
        return TensorRule(partial(sce, select_topk=source.setting(self.select_topk, 1.0)))
