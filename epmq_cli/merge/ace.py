"""ACE: least squares on input covariances that are estimated from the task vectors themselves (Xu et al. 2026,
https://arxiv.org/abs/2603.02945; the formulas are those of the authors' code, `ace_merging` in
https://github.com/unravel-xu/ACE-Merging).

The covariance of a task is C = T' T for its task vector T (out, in) minus the mean of its rows. Where the tasks' sizes
differ much in a matrix (`threshold`), the covariances are divided by their traces, and the leading singular vectors of
the merge with its residual are added with their mean singular value. Unlike in the code, task vectors that are zero are
left out: their covariance would be divided by zero.
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

TINY = 1e-12


def ace(vectors: TaskVectors, eps: float, k_frac: float, threshold: float) -> Tensor:
    """The merged task vector (out, in), computed in float64; each task vector is read twice."""
    sizes = {task: float(vectors[task].double().square().sum()) for task in vectors}
    tasks = [task for task, size in sizes.items() if size > 0]
    if not tasks:
        return torch.zeros_like(vectors.base)
    differ = heterogeneity([sizes[task] for task in tasks]) > threshold
    columns = vectors.base.shape[1]
    zeros = torch.zeros_like(vectors.base, dtype=torch.float64)
    plain, covariances = zeros.new_zeros(columns, columns), zeros.new_zeros(columns, columns)
    weighted, residual, total = zeros.clone(), zeros.clone(), zeros.clone()
    for task in tasks:
        vector = vectors[task].double()
        centred = vector - vector.mean(0, keepdim=True)
        covariance = centred.T @ centred
        share = covariance.trace() + TINY if differ else 1.0
        covariance /= share
        plain += covariance
        residual += vector @ covariance
        total += vector
        covariance.diagonal().add_(eps / share)
        covariances += covariance
        weighted += centred @ covariance
    prior = plain.mean(0, keepdim=True)
    if differ:
        prior /= sum(sizes[task] for task in tasks) / len(tasks) + TINY
    merged = _divided(weighted, covariances + prior)
    if differ:
        merged += _refinement(merged + residual - total @ (covariances / len(tasks)), k_frac)
    return merged.to(vectors.base.dtype)


def heterogeneity(sizes: list[float]) -> float:
    """The variance of the logarithms of the task vectors' squared norms, divided by their squared mean; 0 for one."""
    logarithms = torch.tensor(sizes, dtype=torch.float64).add(TINY).log()
    return float(logarithms.var() / (logarithms.mean().square() + TINY)) if len(sizes) > 1 else 0.0


def _divided(B: Tensor, A: Tensor) -> Tensor:
    """B A^-1, by the pseudoinverse if A is singular."""
    factors, pivots, failed = torch.linalg.lu_factor_ex(A)
    solution: Tensor = B @ torch.linalg.pinv(A) if failed else torch.linalg.lu_solve(factors, pivots, B, left=False)
    return solution


def _refinement(matrix: Tensor, k_frac: float) -> Tensor:
    """The leading part `k_frac` of the singular vectors, times their mean singular value; zero without any."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    k = int(len(S) * k_frac)
    refinement: Tensor = S[:k].sum() / max(1, k) * (U[:, :k] @ Vh[:k])
    return refinement


@dataclass(frozen=True)
class Ace(Parameters):
    """`merge=ace`.

    `eps`: added to the diagonal of each covariance. `k_frac`: the part of the singular vectors that the refinement
    adds. `threshold`: the heterogeneity of the tasks above which covariances are normalized and refined. `tables`: the
    merge of matrices over the vocabulary, the `mean` of their task vectors, or `merge` as all other matrices.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    eps: Annotated[float, Number(0, 100, open_low=True)]
    k_frac: Annotated[float, Number(0, 1)]
    threshold: Annotated[float, Number(0, 1_000_000)]
    tables: Annotated[str, Choice(TABLES)]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule, which holds three matrices (in, in) in float64; reads no model."""

        def merge(vectors: TaskVectors) -> Tensor:
            return ace(vectors, self.eps, self.k_frac, self.threshold)

        return matrix_rule(source, self.tables, 1.0, merge)
