"""Cholesky factors of moments that may be singular."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RETRIES = 8  # each with ten times the damping, from SMALLEST or the first try's up
SMALLEST = 1e-8
ITERATIONS = 20


@dataclass(frozen=True)
class Factor:
    """`lower` L with L L' = H + damping * mean(diag H) * I, and how it was had: the damping used, and how often it had
    to be raised."""

    lower: Tensor
    damping: float
    retries: int


def damped_cholesky(H: Tensor, damping: float) -> Factor | None:
    """The Cholesky factor of a symmetric matrix, with more damping where it is not positive definite.

    `damping` is relative to the mean of the diagonal. None where no try succeeds: H holds a NaN or is not a moment.
    """
    diagonal_mean = H.diagonal().mean()
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    used = damping
    for retries in range(RETRIES + 1):
        lower, failed = torch.linalg.cholesky_ex(H + used * diagonal_mean * identity)
        if not failed and torch.isfinite(lower).all():
            return Factor(lower, used, retries)
        used = max(10 * used, SMALLEST)
    return None


def condition(H: Tensor, factor: Factor) -> float:
    """Estimate from below of the 2-norm condition number of L L', by power iteration on it and on its inverse.

    `ITERATIONS` products with H and as many solves with L; within a few percent where the extreme eigenvalues stand
    apart.
    """
    damping = factor.damping * H.diagonal().mean()
    start = torch.linspace(1, 2, len(H), dtype=H.dtype, device=H.device)[:, None]
    large = small = start / start.norm()
    high = low = torch.ones((), dtype=H.dtype, device=H.device)
    for _ in range(ITERATIONS):
        large = H @ large + damping * large
        high = large.norm()
        large = large / high
        small = torch.cholesky_solve(small, factor.lower)
        low = small.norm()
        small = small / low
    return float(high * low)
