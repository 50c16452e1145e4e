"""Task Arithmetic (Ilharco et al. 2023, https://arxiv.org/abs/2212.04089, section 2, "learning via addition")."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from epmq_cli.config.validate import check_range
from epmq_cli.merge.source import ElementwiseRule, MergeSource


def task_arithmetic(base: Tensor, experts: list[Tensor], scale: float) -> Tensor:
    """Base plus `scale` times the sum of the task vectors."""
    total = experts[0] - base
    for expert in experts[1:]:
        total += expert - base
    return base + scale * total


@dataclass(frozen=True)
class TaskArithmetic:
    """`merge=task_arithmetic`: `scale` is the paper's lambda, in [0, 10]; 0 gives the base."""

    scale: float

    def __post_init__(self) -> None:
        check_range("merge.scale", self.scale, 0, 10)

    def __call__(self, source: MergeSource) -> ElementwiseRule:
        return partial(task_arithmetic, scale=self.scale)
