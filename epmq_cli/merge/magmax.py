"""MagMax: each element takes the largest change among the task vectors (Marczak et al. 2024,
https://arxiv.org/abs/2407.06322, section 4.2).

Of two changes of the same size and different signs the positive one counts, not the last expert's as in the authors'
code, so that the order of the experts changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece
from epmq_cli.merge.parameters import LARGEST_WEIGHT, Parameters, PerTensor, Weight
from epmq_cli.merge.settings import Setting, weighted
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


def largest_change(vectors: list[Tensor]) -> Tensor:
    """For each element (n,), the value with the largest magnitude."""
    high, low = vectors[0], vectors[0]
    for vector in vectors[1:]:
        high, low = torch.maximum(high, vector), torch.minimum(low, vector)
    return torch.where(high >= -low, high, low)


@dataclass(frozen=True)
class MagMax(Parameters):
    """`merge=magmax`: `scale` is the factor on the merged task vector; `weights` are factors on the task vectors before
    they are compared, None for 1 each. Both are settings."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    scale: Annotated[Setting, PerTensor(0, 10)]
    weights: Annotated[Setting, Weight(-LARGEST_WEIGHT)]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model."""
        scales, weights = source.setting(self.scale, 1.0), source.setting(self.weights, 1.0)

        def merge(piece: Piece) -> Tensor:
            vectors = weighted(piece.task_vectors(), weights, piece.name)
            return piece.base + scales.at(piece.name) * largest_change(vectors)

        return ElementwiseRule(merge)
