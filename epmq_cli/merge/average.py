"""Simple and weighted averages of the experts (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 2,
uniform soup)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from epmq_cli.errors import ConfigError
from epmq_cli.merge.gram import combination
from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece
from epmq_cli.merge.parameters import LARGEST_WEIGHT, Parameters, Weight
from epmq_cli.merge.settings import Setting, TensorSetting
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SUM = 1e-8


def average(experts: Sequence[Tensor]) -> Tensor:
    """Mean of the experts; the base is not one of them."""
    total = experts[0].clone()
    for expert in experts[1:]:
        total += expert
    return total / len(experts)


def weighted_average(experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Mean of the experts, each times its weight, divided by the sum of the weights."""
    return combination(weights, experts) / sum(weights)


@dataclass(frozen=True)
class Linear(Parameters):
    """`merge=linear`: the sum of the experts, each times its weight.

    `weights`: factors, a setting; None for 1 each. `normalize`: divides by the sum of the weights.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    core: ClassVar[bool | str] = "normalize"

    weights: Annotated[Setting, Weight(-LARGEST_WEIGHT)]
    normalize: bool

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model. ConfigError if the weights of a tensor sum to 0 and are divided by that."""
        weights = source.setting(self.weights, 1.0)
        if self.normalize:
            check_sums(weights, source)

        def merge(piece: Piece) -> Tensor:
            experts = list(piece.experts.values())
            if self.weights is None and self.normalize:
                return average(experts)
            own = [weights.at(piece.name, task) for task in piece.experts]
            return weighted_average(experts, own) if self.normalize else combination(own, experts)

        return ElementwiseRule(merge)


def check_sums(weights: TensorSetting, source: MergeSource) -> None:
    """ConfigError if the weights of a tensor sum to 0."""
    for name in source.names:
        total = sum(weights.at(name, task) for task in source.tasks)
        if abs(total) < SMALLEST_SUM:
            raise ConfigError(
                f"merge.weights sum to 0 at {name}, and the merge is divided by their sum; change the weights"
            )


@dataclass(frozen=True)
class Average(Parameters):
    """`merge=average`: `weights` are factors, a setting; None for 1 each."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    weights: Annotated[Setting, Weight()] = None

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model."""
        return Linear(self.weights, normalize=True).fit(source, data)
