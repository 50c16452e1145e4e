"""Simple average of the experts (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 2, uniform soup)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece
from epmq_cli.merge.parameters import Parameters, Weight
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource


def average(experts: Sequence[Tensor]) -> Tensor:
    """Mean of the experts; the base is not one of them."""
    total = experts[0].clone()
    for expert in experts[1:]:
        total += expert
    return total / len(experts)


def weighted_average(experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Mean of the experts, each times its weight, divided by the sum of the weights."""
    total = weights[0] * experts[0]
    for weight, expert in zip(weights[1:], experts[1:], strict=True):
        total += weight * expert
    return total / sum(weights)


@dataclass(frozen=True)
class Average(Parameters):
    """`merge=average`: `weights` are factors, a setting; None for 1 each."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    weights: Annotated[Setting, Weight()] = None

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model."""
        weights = source.setting(self.weights, 1.0)

        def merge(piece: Piece) -> Tensor:
            experts = list(piece.experts.values())
            if self.weights is None:
                return average(experts)
            return weighted_average(experts, [weights.at(piece.name, task) for task in piece.experts])

        return ElementwiseRule(merge)
