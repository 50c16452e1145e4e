"""The objective that calibration hands to a quantizer, and its unquantized optimum (E-PMQ,
https://arxiv.org/abs/2605.16882; with alpha, rho and intercepts FeatCal, https://arxiv.org/abs/2605.13030).

For one linear with anchor A, a and experts W_t, b_t; the student's inputs X_t and the targets Y_t,

    J(Q, b) = sum_t s_t || X_t Q' + b - Y_t ||_F^2  +  lam || Q - A ||_F^2  +  lam || b - a ||^2
    Y_t     = X_t W_t' + b_t + P_t        P_t = alpha (E_t - X_t) W_t' + beta (r_E - r_X).

It is kept in terms of D = Q - A and d = b - a, so that experts equal to the anchor give D = 0 to the last bit. With
the moments H = sum_t s_t X_t'X_t + lam I, h and u the weighted sums of the inputs and of Y_t - X_t A' - a, and N the
sum of the weights, the best intercept of any Q is d = (u - D h) / (N + lam), which leaves

    J = tr D H D' - 2 tr D S' + c         H <- H - h h' / (N + lam)         S <- S - u h' / (N + lam)
    W* = A + S H^-1

and J(Q) = tr (Q - W*) H (Q - W*)' + const: what GPTQ minimises when it is given W* and H. Without intercepts h = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from epmq_cli.calibrate.moments import Moments
from epmq_cli.linalg import condition, damped_cholesky


@dataclass(frozen=True)
class Affine:
    """A linear's weight (out, in), and its bias (out,) where it has one."""

    weight: Tensor
    bias: Tensor | None

    def double(self) -> Affine:
        """The same in float64."""
        return Affine(self.weight.double(), None if self.bias is None else self.bias.double())


@dataclass(frozen=True)
class Solved:
    """What H needed: its damping, relative to its mean diagonal, how often that had to be raised, and the condition
    number that it then had (estimated from below); None where nothing was to be solved."""

    damping: float
    retries: int
    condition: float | None


class Objective:
    """J of the linears that share one input, accumulated task by task; everything in float64.

    `intercepts`: whether their biases are free; all anchors must have one then.
    """

    def __init__(self, anchors: Sequence[Affine], lam: float, intercepts: bool) -> None:
        self._dtype = anchors[0].weight.dtype
        self.anchors = [anchor.double() for anchor in anchors]
        weights = [anchor.weight for anchor in self.anchors]
        width = weights[0].shape[1]
        self._intercepts = intercepts
        self._H = lam * torch.eye(width, dtype=torch.float64, device=weights[0].device)
        self._h, self._N = torch.zeros_like(weights[0][0]), lam
        self._S = [torch.zeros_like(weight) for weight in weights]
        self._u = [torch.zeros_like(weight[:, 0]) for weight in weights]
        self._constants = [0.0] * len(weights)
        self._outputs = [0.0] * len(weights)
        self._lam = lam

    def add(self, moments: Moments, experts: Sequence[Affine], s: float) -> None:
        """One task of weight s_t: its moments, and each linear's expert."""
        self._H.add_(moments.xx, alpha=s)
        self._h.add_(moments.x, alpha=s)
        self._N += s * moments.tokens
        xx = moments.xx.to(experts[0].weight.dtype)
        for index, (anchor, given) in enumerate(zip(self.anchors, experts, strict=True)):
            expert = given.double()
            delta = expert.weight - anchor.weight
            shift = torch.zeros_like(self._u[index])
            if self._intercepts and expert.bias is not None and anchor.bias is not None:
                shift = expert.bias - anchor.bias
            pushed = (delta.to(xx.dtype) @ xx).double() if delta.any() else torch.zeros_like(delta)
            sums = delta @ moments.x
            self._S[index] += s * (pushed + torch.outer(shift, moments.x) + moments.px[index])
            self._u[index] += s * (sums + shift * moments.tokens + moments.p[index])
            square = (pushed * delta).sum() + 2 * (delta * moments.px[index]).sum() + moments.pp[index]
            square += shift @ (moments.tokens * shift + 2 * (sums + moments.p[index]))
            self._constants[index] += s * float(square)
            self._outputs[index] += s * float((pushed * (anchor.weight + expert.weight)).sum())

    @cached_property
    def hessian(self) -> Tensor:
        """What a quantizer minimises the error in: (in, in); once it was asked for, nothing more can be added."""
        return self._H.addr_(self._h, self._h, alpha=-1 / self._N) if self._centred else self._H

    @property
    def _centred(self) -> bool:
        return self._intercepts and self._N > 0

    def _shift(self, index: int) -> Tensor:
        if not self._centred:
            return self._S[index]
        return self._S[index] - torch.outer(self._u[index], self._h) / self._N

    def targets(self) -> tuple[list[Tensor], Solved | None]:
        """W* of each linear (out, in), and what H needed for it; the anchors where nothing pulls away from them; the
        anchors and None where H has no factor.

        Columns whose input is always zero keep the anchor's value.
        """
        return self._solutions

    @cached_property
    def _solutions(self) -> tuple[list[Tensor], Solved | None]:
        H, dead = self.hessian, self.hessian.diagonal() == 0
        if not any(self._shift(index).any() for index in range(len(self.anchors))):
            return [anchor.weight for anchor in self.anchors], Solved(0.0, 0, None)
        factor = damped_cholesky(H + torch.diag(dead.to(H.dtype)) if dead.any() else H, 0.0)
        if factor is None:
            return [anchor.weight for anchor in self.anchors], None
        found = [
            anchor.weight + torch.cholesky_solve(self._shift(index).T, factor.lower).T
            for index, anchor in enumerate(self.anchors)
        ]
        return found, Solved(factor.damping, factor.retries, condition(H, factor))

    def bias(self, index: int, weight: Tensor) -> Tensor | None:
        """The best bias (out,) beside a weight (out, in); None without intercepts.

        It makes up for the mean of the quantization error too.
        """
        anchor = self.anchors[index]
        if not self._intercepts or anchor.bias is None:
            return None
        if not self._centred:
            return anchor.bias
        return anchor.bias + (self._u[index] - (weight.double() - anchor.weight) @ self._h) / self._N

    def anchor_loss(self, index: int) -> float:
        """`relative_loss` of the anchor, which the sums hold as it is."""
        return self._relative(index, self._constants[index])

    def relative_loss(self, index: int, weight: Tensor) -> float:
        """J of a weight (out, in) with its best bias, relative to what the experts' weights give, sum_t s_t || X_t W_t'
        ||^2; 0 where that is 0.

        As J(W*) + tr (Q - W*) H (Q - W*)', so that a small loss is no difference of large numbers; D H D' in J(W*) is
        what W* was solved for.
        """
        solution, solved = self._solutions
        delta, shift = solution[index] - self.anchors[index].weight, self._shift(index)
        error = weight.double() - solution[index]
        damping = 0.0 if solved is None else solved.damping * float(self.hessian.diagonal().mean())
        slope = -2 * (shift if solved is None else damping * delta)  # of J at W*, as D (H + damping) = S
        loss = self._constants[index] - float((delta * (shift - slope / 2)).sum()) + float((error * slope).sum())
        return self._relative(index, loss + self._energy(error, self.hessian))

    def _relative(self, index: int, loss: float) -> float:
        if self._centred:
            loss -= float(self._u[index].square().sum()) / self._N
        return max(loss, 0.0) / self._outputs_of[index] if self._outputs_of[index] > 0 else 0.0

    def _energy(self, weight: Tensor, moment: Tensor) -> float:
        """tr W H W', in the type of the weights that were given."""
        if not weight.any():
            return 0.0
        W = weight.to(self._dtype)
        return float(((W @ moment.to(self._dtype)) * W).sum())

    @cached_property
    def _outputs_of(self) -> list[float]:
        """sum_t s_t || X_t W_t' ||^2 of each linear.

        `_outputs` has what the experts' weights give beyond the anchor's, W W' = A A' + (W - A)(W + A)' in the product
        with X'X, so that the rest is one product and not one for each task.
        """
        found = []
        for anchor, beyond in zip(self.anchors, self._outputs, strict=True):
            centred = float((anchor.weight @ self._h).square().sum()) / self._N if self._centred else 0.0
            own = self._energy(anchor.weight, self.hessian) + centred
            found.append(beyond + own - self._lam * float(anchor.weight.square().sum()))
        return found
