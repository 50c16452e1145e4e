"""Oracle: the formulas of the authors' code, written out with an explicit inverse, on matrices of like and of unlike
sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epmq_cli.merge.ace import ace, heterogeneity
from tests.merge.test_iso import given, random

ALIKE = [random(8, 6, seed=seed) for seed in range(3)]
UNLIKE = [random(8, 6, seed=seed) * size for seed, size in enumerate((0.1, 1.0, 3.0))]


def reference(vectors: list[Tensor], eps: float, k: int, refined: bool) -> Tensor:
    unit, centred = torch.eye(6, dtype=torch.float64), [T - T.mean(0) for T in vectors]
    traces = [(T.T @ T).trace() if refined else torch.ones(()) for T in centred]
    C = [T.T @ T / trace for T, trace in zip(centred, traces, strict=True)]
    eps_of = [eps / trace for trace in traces]
    prior = torch.stack(C).sum(0).mean(0)
    if refined:
        prior = prior / torch.stack([T.square().sum() for T in vectors]).mean()
    A = sum(c + e * unit for c, e in zip(C, eps_of, strict=True))
    merged = sum(T @ (c + e * unit) for T, c, e in zip(centred, C, eps_of, strict=True)) @ torch.inverse(A + prior)
    if not refined:
        return merged
    residual = sum(T @ (c - A / len(vectors)) for T, c in zip(vectors, C, strict=True))
    U, S, Vh = torch.linalg.svd(merged + residual)
    return merged + S[:k].mean() * U[:, :k] @ Vh[:k]


def test_matrices_of_like_sizes_are_solved_without_refinement() -> None:
    assert heterogeneity([float(T.square().sum()) for T in ALIKE]) < 0.3
    torch.testing.assert_close(ace(given(ALIKE), 0.01, 0.5, 0.3), reference(ALIKE, 0.01, 3, refined=False))


def test_matrices_of_unlike_sizes_are_normalized_and_refined() -> None:
    assert heterogeneity([float(T.square().sum()) for T in UNLIKE]) > 0.3
    torch.testing.assert_close(ace(given(UNLIKE), 0.01, 0.5, 0.3), reference(UNLIKE, 0.01, 3, refined=True))


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1), (2, 40)])
def test_zero_task_vectors_and_small_dimensions_stay_finite(shape: tuple[int, int]) -> None:
    zero, vector = torch.zeros(shape, dtype=torch.float64), random(*shape)
    assert torch.equal(ace(given([zero, zero]), 0.01, 0.3, 0.3), zero)
    assert torch.equal(ace(given([zero, vector]), 0.01, 0.3, 0.3), ace(given([vector]), 0.01, 0.3, 0.3))
    assert ace(given([vector, vector * 1e-9]), 0.01, 0.3, 0.0).isfinite().all()
