"""WUDI: the task vector with the least interference with the inputs that the task vectors themselves span (Cheng et al.
2025, https://arxiv.org/abs/2503.08099, equation 12), by the paper's gradient steps or in closed form.

The paper minimizes the sum over tasks i of |(M - T_i) T_i'|^2 / |T_i|^2 for the task vectors T_i (out, in), from their
sum, by a few steps of Adam. Its gradient 2 (M A - B) needs only A = sum_i T_i' T_i / |T_i|^2 (in, in) and B = sum_i T_i
T_i' T_i / |T_i|^2 (out, in), so one task vector is in memory at a time. The closed form is the minimum of the same sum
plus a ridge that pulls M to the sum of the task vectors, as a few steps do. Task vectors that are zero are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.matrices import TABLES, TaskVectors, matrix_rule
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Choice, Number, Parameters
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's."""


def moments(vectors: TaskVectors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (in, in) and B (out, in) of the module's docstring."""
    A = torch.zeros(vectors.base.shape[1], vectors.base.shape[1], dtype=dtype, device=vectors.base.device)
    B = torch.zeros_like(vectors.base, dtype=dtype)
    for task in vectors:
        T = vectors[task].to(dtype)
        size = T.square().sum()
        if size > 0:
            G = T.T @ T / size
            A += G
            B += T @ G
    return A, B


def closed_form(vectors: TaskVectors, ridge: float) -> Tensor:
    """The minimum (out, in), solved in float64. `ridge`: its weight, times the mean of A's diagonal."""
    A, B = moments(vectors, torch.float64)
    weight = ridge * A.diagonal().mean()
    if weight == 0:  # every task vector is zero
        return torch.zeros_like(vectors.base)
    A.diagonal().add_(weight)
    factor = torch.linalg.cholesky(A)
    return torch.cholesky_solve((B + weight * vectors.total()).T, factor).T.to(vectors.base.dtype)


def gradient_steps(vectors: TaskVectors, iterations: int, lr: float) -> Tensor:
    """The sum of the task vectors after some steps of Adam (out, in)."""
    A, B = moments(vectors, vectors.base.dtype)
    merged = vectors.total()
    mean, square = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, iterations + 1):
        gradient = 2 * (merged @ A - B)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        deviation = (square / (1 - BETAS[1] ** step)).sqrt() + EPSILON
        merged -= lr / (1 - BETAS[0] ** step) * mean / deviation
    return merged


@dataclass(frozen=True)
class Wudi(Parameters):
    """`merge=wudi`.

    `solver`: `gradient`, the paper's steps, or `closed_form`. `iterations` and `lr`: those of the gradient steps.
    `ridge`: the weight of the sum of the task vectors in the closed form, relative to the mean of A's diagonal.
    `tables`: the merge of matrices over the vocabulary, the `mean` of their task vectors, or `merge` as all other
    matrices.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    solver: Annotated[str, Choice(("gradient", "closed_form"))]
    iterations: Annotated[int, Number(1, 100_000, integer=True)]
    lr: Annotated[float, Number(0, 1, open_low=True)]
    ridge: Annotated[float, Number(0, 100, open_low=True)]
    tables: Annotated[str, Choice(TABLES)]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule, which holds one task vector and a matrix (in, in); reads no model."""

        def merge(vectors: TaskVectors) -> Tensor:
            if self.solver == "gradient":
                return gradient_steps(vectors, self.iterations, self.lr)
            return closed_form(vectors, self.ridge)

        return matrix_rule(source, self.tables, 1.0, merge)
