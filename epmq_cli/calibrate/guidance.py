"""The objective that calibration hands to a quantizer, and its unquantized optimum (E-PMQ,
https://arxiv.org/abs/2605.16882).

For one linear with anchor A (the merged weight), experts W_t and the student's inputs X_t,

    J(Q) = sum_t s_t || X_t (Q - W_t)' ||_F^2  +  lam || Q - A ||_F^2.

It is kept in terms of D = Q - A, so that experts equal to the anchor give D = 0 to the last bit:

    J(A + D) = tr D H D' - 2 tr D S' + c        H = sum_t s_t X_t'X_t + lam I        S = sum_t s_t (W_t - A) X_t'X_t
    W* = A + S H^-1                             c = sum_t s_t tr (W_t - A) X_t'X_t (W_t - A)'

and J(Q) = tr (Q - W*) H (Q - W*)' + const: what GPTQ minimises when it is given W* and H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_cli.calibrate.moments import task_weight
from epmq_cli.errors import check_choice, check_range
from epmq_cli.linalg import Factor, damped_cholesky

TARGETS = ("merged", "expert")
TASK_WEIGHTS = ("frobenius", "tokens")


@dataclass(frozen=True)
class Guidance:
    """`guidance=<name>`.

    `targets`: whose outputs the linears shall give, `merged` (plain post-training quantization) or each task's
    `expert`. `lam`: weight of the anchor, at least 0; with `task_weight: frobenius` a pure number. `task_weight`:
    s_t, see moments.py.
    """

    targets: str
    lam: float
    task_weight: str

    def __post_init__(self) -> None:
        check_choice("guidance.targets", self.targets, TARGETS)
        check_range("guidance.lam", self.lam, 0, float("inf"))
        check_choice("guidance.task_weight", self.task_weight, TASK_WEIGHTS)


class Objective:
    """J of the linears that share one input, accumulated task by task; everything in float64."""

    def __init__(self, anchors: Sequence[Tensor], guidance: Guidance) -> None:
        self.anchors = [anchor.double() for anchor in anchors]
        self._guidance = guidance
        width = self.anchors[0].shape[1]
        self.H = guidance.lam * torch.eye(width, dtype=torch.float64, device=self.anchors[0].device)
        self._shifts = [torch.zeros_like(anchor) for anchor in self.anchors]
        self._constants = [0.0] * len(self.anchors)
        self._outputs = [0.0] * len(self.anchors)

    def add(self, moment: Tensor, tokens: int, experts: Sequence[Tensor]) -> None:
        """One task: X'X (in, in), its tokens, and for each linear the weight whose outputs are the target (out, in)."""
        moment = moment * task_weight(moment, tokens, self._guidance.task_weight)
        self.H += moment
        for index, (anchor, expert) in enumerate(zip(self.anchors, experts, strict=True)):
            delta = expert.double() - anchor
            pushed = delta @ moment
            self._shifts[index] += pushed
            self._constants[index] += float((pushed * delta).sum())
            self._outputs[index] += float(((expert.double() @ moment) * expert.double()).sum())

    def targets(self) -> tuple[list[Tensor], Factor | None]:
        """W* of each linear (out, in), and the factor of H; the anchors and None where H has no factor.

        Columns whose input is always zero keep the anchor's value.
        """
        H = self.H.clone()
        H.diagonal()[H.diagonal() == 0] = 1
        factor = damped_cholesky(H, 0.0)
        if factor is None:
            return self.anchors, None
        shifts = zip(self.anchors, self._shifts, strict=True)
        return [anchor + torch.cholesky_solve(shift.T, factor.lower).T for anchor, shift in shifts], factor

    def relative_loss(self, index: int, weight: Tensor) -> float:
        """J of a weight (out, in) for one linear, relative to sum_t s_t || X_t W_t' ||^2; 0 where that is 0."""
        delta = weight.double() - self.anchors[index]
        loss = (
            float(((delta @ self.H) * delta).sum() - 2 * (delta * self._shifts[index]).sum()) + self._constants[index]
        )
        return max(loss, 0.0) / self._outputs[index] if self._outputs[index] > 0 else 0.0
