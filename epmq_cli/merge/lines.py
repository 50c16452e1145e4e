"""LiNeS: scales the merged task vector by a factor that grows linearly from the first to the last layer (Wang et al.
2024, https://arxiv.org/abs/2410.17146, section 4; https://github.com/wang-kee/LiNeS).

Layers are counted in each stack on its own, so that an encoder and a decoder both start at the first layer. Tensors
behind the layers, such as the last norm, count as the last layer, and not as the first one as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece, PostRule
from epmq_cli.merge.parameters import LARGEST_WEIGHT, Number, Parameters, Weight
from epmq_cli.merge.settings import Setting, weighted
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.task_arithmetic import add_task_vectors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lines(Parameters):
    """`merge=lines`: Task Arithmetic with a factor for each layer.

    `alpha`: the factor in the first layer; None for 1 / experts, as in the paper, where those of weight 0 do not count.
    `beta`: what the last layer's factor is more than that. `weights`: factors on the task vectors; None for 1 each.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    alpha: Annotated[float | None, Number(0, 10, null=True)]
    beta: Annotated[float, Number(0, 10)]
    weights: Annotated[Setting, Weight(-LARGEST_WEIGHT)]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model."""
        weights, depths = source.setting(self.weights, 1.0), source.depths

        def merge(piece: Piece) -> Tensor:
            vectors = weighted(piece.task_vectors(), weights, piece.name)
            experts = sum(weights.at(piece.name, task) != 0 for task in piece.experts)
            alpha = 1 / max(1, experts) if self.alpha is None else self.alpha
            return add_task_vectors(piece.base, vectors, alpha + self.beta * depths[piece.name])

        return ElementwiseRule(merge)


@dataclass(frozen=True)
class ScaledLayers:
    """The post-processor `lines`: scales a merged task vector by the factor of its layer. The defaults keep the last
    layer as merged."""

    summary: ClassVar[str] = (
        "LiNeS: scales the merged task vector by a factor that grows from the first to the last layer (2024, "
        "https://arxiv.org/abs/2410.17146)."
    )

    alpha: Annotated[float, Number(0, 10), "the first layer's factor"] = 0.5
    beta: Annotated[float, Number(0, 10), "the last layer's factor minus alpha"] = 0.5

    def fit(self, source: MergeSource) -> PostRule:
        """Returns the rule; reads no model."""

        def scaled(name: str, base: Tensor, experts: Mapping[str, Tensor], merged: Tensor) -> Tensor:
            return base + (self.alpha + self.beta * source.depths[name]) * (merged - base)

        return PostRule(scaled)
