"""Cholesky factors of moments that may be singular."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

RETRIES = 8  # each with ten times the damping, starting from SMALLEST or the initial damping
SMALLEST = 1e-8
ITERATIONS = 8
SETTLED = 0.003  # relative change at which power iteration stops
SMALL = 256


@dataclass(frozen=True)
class Factor:
    """`lower` L with L L' = H + damping * mean(diag H) * I; the damping, and the number of times that it was raised."""

    lower: Tensor
    damping: float
    retries: int


def is_finite(tensor: Tensor) -> bool:
    """Whether all items are finite; the sum is a fast test, unless it overflows itself."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def damped_cholesky(H: Tensor, damping: float, order: Tensor | None = None) -> Factor | None:
    """The Cholesky factor of a symmetric matrix, with more damping if it is not positive definite.

    `damping` is relative to the mean of the diagonal; `order` (n,): of the rows and columns of H that is factored. None
    if no try succeeds, because H holds NaN or is not a moment matrix.
    """
    diagonal_mean, used = H.diagonal().mean(), damping
    for retries in range(RETRIES + 1):
        damped = H.clone() if order is None else H[order[:, None], order]
        damped.diagonal().add_(used * diagonal_mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.isfinite(lower).all():
            return Factor(lower, used, retries)
        used = max(10 * used, SMALLEST)
    return None


def triangular_inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, itself lower triangular.

    It recurses by halves down to `SMALL`, which takes a third of the multiplications of a general triangular solve.
    """
    n = len(lower)
    if n <= SMALL:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        small: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return small
    half = n // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = triangular_inverse(lower[:half, :half])
    inverse[half:, half:] = triangular_inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse


def condition(H: Tensor, factor: Factor) -> float:
    """Estimate from below of the 2-norm condition number of L L', by power iteration on it and on its inverse.

    At most `ITERATIONS` products with H and as many solves with L; within a few percent if the extreme eigenvalues
    are well separated.
    """
    damping = factor.damping * H.diagonal().mean()
    high = _largest(lambda x: H @ x + damping * x, H)
    low = _largest(lambda x: torch.cholesky_solve(x, factor.lower), H)
    return high * low


def _largest(multiply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The largest eigenvalue, from below, of a positive definite matrix with the shape of `like`."""
    vector = torch.linspace(1, 2, len(like), dtype=like.dtype, device=like.device)[:, None]
    vector, value = vector / vector.norm(), 0.0
    for _ in range(ITERATIONS):
        product = multiply(vector)
        before, value = value, float(product.norm())
        if abs(value - before) <= SETTLED * value:
            break
        vector = product / value
    return value
