"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; step sizes of Liu et al. 2025,
https://arxiv.org/abs/2502.16982, section 2.2): steps along the orthogonalized momentum of a matrix.

torch.optim.Muon computes in bfloat16, which takes 12 to 34 times as long on CPUs without instructions for it; this is
the same in the type of the matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial that drives singular values to about 1
STEPS = 5
SMALLEST = 1e-7
RMS = 0.2  # of a step of Adam


class Muon(torch.optim.Optimizer):
    """An optimizer of matrices, without weight decay. `momentum` is of Nesterov's kind."""

    def __init__(self, matrices: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients, whose root mean square is 0.2 lr, as with Adam."""
        for group in self.param_groups:
            for matrix in group["params"]:
                buffer = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                buffer.lerp_(matrix.grad, 1 - group["momentum"])
                direction = orthogonalized(matrix.grad.lerp(buffer, group["momentum"]))
                matrix.add_(direction, alpha=-group["lr"] * RMS * max(matrix.shape) ** 0.5)


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U V' of a matrix U S V', by Newton-Schulz steps."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    found: Tensor = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=SMALLEST)
    for _ in range(STEPS):
        gram = found @ found.T
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.T if tall else found
