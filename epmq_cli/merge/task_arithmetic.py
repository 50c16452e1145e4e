"""Task Arithmetic (Ilharco et al. 2023, https://arxiv.org/abs/2212.04089, section 2, "learning via addition")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece
from epmq_cli.merge.parameters import LARGEST_WEIGHT, Parameters, PerTensor, Weight
from epmq_cli.merge.settings import Setting, weighted
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


def task_arithmetic(base: Tensor, experts: Sequence[Tensor], scale: float) -> Tensor:
    """Base plus `scale` times the sum of the task vectors, one in memory at a time."""
    total = experts[0] - base
    for expert in experts[1:]:
        total += expert - base
    return base + scale * total


def add_task_vectors(base: Tensor, vectors: Sequence[Tensor], scale: float) -> Tensor:
    """Base plus `scale` times the sum of the task vectors."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return base + scale * total


@dataclass(frozen=True)
class TaskArithmetic(Parameters):
    """`merge=task_arithmetic`.

    `scale`: the paper's lambda, in [0, 10]; 0 returns the base. `weights`: factors on the task vectors, None for 1
    each; negative ones unlearn a task. Both are settings.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    scale: Annotated[Setting, PerTensor(0, 10)]
    weights: Annotated[Setting, Weight(-LARGEST_WEIGHT)] = None

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model."""
        weights, scales = source.setting(self.weights, 1.0), source.setting(self.scale, 1.0)

        def merge(piece: Piece) -> Tensor:
            scale = scales.at(piece.name)
            if self.weights is None:
                return task_arithmetic(piece.base, list(piece.experts.values()), scale)
            return add_task_vectors(piece.base, weighted(piece.task_vectors(), weights, piece.name), scale)

        return ElementwiseRule(merge)
