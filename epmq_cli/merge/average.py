"""Simple average of the experts (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 2, uniform soup)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from epmq_cli.merge.source import ElementwiseRule, MergeSource


def average(base: Tensor, experts: list[Tensor]) -> Tensor:
    """Mean of the experts; the base is not one of them."""
    total = experts[0].clone()
    for expert in experts[1:]:
        total += expert
    return total / len(experts)


@dataclass(frozen=True)
class Average:
    """`merge=average`."""

    def __call__(self, source: MergeSource) -> ElementwiseRule:
        return average
