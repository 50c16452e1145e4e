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
LARGE = 4096  # columns; larger triangular matrices are inverted in place, half by half
PANEL = 512  # rows that are copied at a time


@dataclass(frozen=True)
class Factor:
    """`lower` L with L L' = H + damping * mean(diag H) * I; the damping, and the number of times that it was raised."""

    lower: Tensor
    damping: float
    retries: int


def is_finite(tensor: Tensor) -> bool:
    """Whether all items are finite; the sum is a fast test, unless it overflows itself."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def damped_cholesky(
    H: Tensor, damping: float, order: Tensor | None = None, ridge: Tensor | None = None
) -> Factor | None:
    """The Cholesky factor of a symmetric matrix, with more damping if it is not positive definite. It is computed in
    place in the only copy of H.

    `damping` is relative to the mean of the diagonal; `order` (n,): of the rows and columns of H that is factored;
    `ridge` (n,): added to the diagonal first. None if no try succeeds, because H holds NaN or is not a moment matrix.
    """
    diagonal = H.diagonal() if ridge is None else H.diagonal() + ridge
    diagonal_mean, used = diagonal.mean(), damping
    diagonal = diagonal if order is None else diagonal[order]
    failed = torch.empty((), dtype=torch.int32, device=H.device)
    for retries in range(RETRIES + 1):
        lower = _column_major(H, order)
        lower.diagonal().copy_(diagonal + used * diagonal_mean)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed and is_finite(lower):
            return Factor(lower, used, retries)
        del lower  # before another copy is made
        used = max(10 * used, SMALLEST)
    return None


def _column_major(H: Tensor, order: Tensor | None) -> Tensor:
    """The lower triangle of a copy of H with its rows and columns in this order; LAPACK factors it where it is, as its
    columns follow each other in memory."""
    if order is None:
        return H.T.clone(memory_format=torch.contiguous_format).T
    upper = H[order[:, None], order]
    for start in range(0, len(upper), PANEL):
        end = start + PANEL
        upper[start:end, start:end] = upper[start:end, start:end].T.clone()
        upper[start:end, end:] = upper[end:, start:end].T
    return upper.T


def cholesky_solve(lower: Tensor, right: Tensor) -> Tensor:
    """X with L L' X = right (n, m); unlike torch.cholesky_solve, it does not copy L, which `damped_cholesky` made."""
    inner = torch.linalg.solve_triangular(lower, right, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(lower.T, inner, upper=True)
    return solved


def invert_triangular(lower: Tensor) -> None:
    """Replaces a lower triangular matrix by its inverse. The parts of a large one are inverted where they are, so that
    less than a quarter of its size is taken beside it."""
    n = len(lower)
    if n <= LARGE:
        lower.copy_(triangular_inverse(lower))
        return
    half = n // 2
    invert_triangular(lower[:half, :half])
    invert_triangular(lower[half:, half:])
    for start in range(0, half, PANEL):  # a panel needs only columns that are not replaced yet
        end = min(start + PANEL, half)
        product = lower[half:, start:half] @ lower[start:half, start:end]
        lower[half:, start:end] = (lower[half:, half:] @ product).neg_()


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
    low = _largest(lambda x: cholesky_solve(factor.lower, x), H)
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
