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

Several processes share the work: of H and S each adds up its own columns, and of W, of losses and biases it has its own
rows, those of `ranks.rows`; one process has all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from epmq_cli import ranks
from epmq_cli.calibrate.moments import Moments
from epmq_cli.linalg import condition, damped_cholesky


@dataclass(frozen=True)
class Affine:
    """A linear's weight (out, in), and its bias (out,) where it has one."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def stacked(cls, parts: Sequence[Affine]) -> Affine:
        """The linears of one input as one, with a bias if all have one."""
        biases = [part.bias for part in parts if part.bias is not None]
        weight = parts[0].weight if len(parts) == 1 else torch.cat([part.weight for part in parts])
        return cls(weight, torch.cat(biases) if len(biases) == len(parts) else None)


@dataclass(frozen=True)
class Solved:
    """What H needed: its damping, relative to its mean diagonal, how often that had to be raised, and the condition
    number that it then had (estimated from below); None where nothing was to be solved."""

    damping: float
    retries: int
    condition: float | None


@dataclass(frozen=True)
class _Sums:
    """The sums of all processes: S of this one's rows (rows, in) and whether it is zero in all of them, and for every
    row (out,) u, J of the anchor without its bias, and what the experts' weights give beyond the anchor's."""

    S: Tensor
    pulls: bool
    u: Tensor
    constant: Tensor
    beyond: Tensor


class Objective:
    """J of a linear, or of several stacked that share one input, accumulated task by task in float64.

    `anchor`: in the type that large products are made in. `intercepts`: whether the biases are free; the anchor must
    have one then. `rows`: those of this process.
    """

    def __init__(self, anchor: Affine, lam: float, intercepts: bool) -> None:
        out, width = anchor.weight.shape
        self.anchor, self.rows, self._columns = anchor, ranks.rows(out), ranks.rows(width)
        self._intercepts, self._lam, self._N = intercepts and anchor.bias is not None, lam, lam
        zeros = partial(torch.zeros, dtype=torch.float64, device=anchor.weight.device)
        columns = len(range(width)[self._columns])
        self._H, self._S, self._h = zeros((columns, width)), zeros((out, columns)), zeros((width,))
        self._H[:, self._columns].fill_diagonal_(lam)
        self._u, self._constant, self._beyond = zeros((out,)), zeros((out,)), zeros((out,))

    def add(self, moments: Moments, expert: Affine, s: float) -> None:
        """One task of weight s_t: its moments, and the expert."""
        self._H.add_(moments.xx, alpha=s)
        self._h.add_(moments.x, alpha=s)
        self._N += s * moments.tokens
        own, delta = self.rows, expert.weight - self.anchor.weight
        shift = torch.zeros_like(self._u)
        if self._intercepts and expert.bias is not None and self.anchor.bias is not None:
            shift = expert.bias.double() - self.anchor.bias.double()
            self._S.addr_(shift, moments.x[self._columns], alpha=s)
        sums = delta[own].double() @ moments.x
        part, squares = (moments.p, moments.pp) if not moments.p.ndim else (moments.p[own], moments.pp[own])
        self._u[own] += s * (sums + shift[own] * moments.tokens + part)
        self._constant[own] += s * (squares + shift[own] * (moments.tokens * shift[own] + 2 * (sums + part)))
        px = moments.xp.T if moments.xp.ndim else moments.xp
        self._S.add_(px, alpha=s)
        if delta.any():
            pushed = (delta @ moments.xx.to(delta.dtype).T).double()
            self._S.add_(pushed, alpha=s)
            before, after, moved = (W[:, self._columns] for W in (self.anchor.weight, expert.weight, delta))
            self._constant.add_(((pushed + 2 * px) * moved).sum(1), alpha=s)
            self._beyond.add_((pushed * (before + after)).sum(1), alpha=s)

    @cached_property
    def hessian(self) -> Tensor:
        """What a quantizer minimises the error in: (in, in); once it was asked for, nothing more can be added."""
        whole = ranks.assembled(self._H, len(self._h))
        return whole.addr_(self._h, self._h, alpha=-1 / self._N) if self._centred else whole

    @cached_property
    def _sums(self) -> _Sums:
        whole = self._S if ranks.count() == 1 else ranks.assembled(self._S.T.contiguous(), len(self._h)).T
        u, constant, beyond = (ranks.added(sums) for sums in (self._u, self._constant, self._beyond))
        pulls = bool(whole.any()) or (self._centred and bool(u.any()))
        S = whole[self.rows]
        if self._centred:
            S.addr_(u[self.rows], self._h, alpha=-1 / self._N)
        return _Sums(S, pulls, u, constant, beyond)

    @property
    def _centred(self) -> bool:
        return self._intercepts and self._N > 0

    @cached_property
    def _own(self) -> Tensor:
        """This process's rows of the anchor, in float64."""
        return self.anchor.weight[self.rows].double()

    def target(self) -> tuple[Tensor, Solved | None]:
        """W* (rows, in), and what H needed for it; the anchor where nothing pulls away from it; the anchor and None
        where H has no factor.

        Columns whose input is always zero keep the anchor's value.
        """
        return self._solution

    @cached_property
    def _solution(self) -> tuple[Tensor, Solved | None]:
        H, dead = self.hessian, self.hessian.diagonal() == 0
        if not self._sums.pulls:
            return self._own, Solved(0.0, 0, None)
        factor = damped_cholesky(H + torch.diag(dead.to(H.dtype)) if dead.any() else H, 0.0)
        if factor is None:
            return self._own, None
        found = self._own + torch.cholesky_solve(self._sums.S.T, factor.lower).T
        return found, Solved(factor.damping, factor.retries, condition(H, factor))

    def bias(self, weight: Tensor) -> Tensor | None:
        """The best bias (rows,) beside a weight (rows, in); None without intercepts.

        It makes up for the mean of the quantization error too.
        """
        if not self._intercepts or self.anchor.bias is None:
            return None
        moved = self._sums.u[self.rows] - (weight.double() - self._own) @ self._h
        return self.anchor.bias[self.rows].double() + (moved / self._N if self._centred else 0)

    def solution(self) -> Affine:
        """W* (out, in) and the best bias beside it, of all rows."""
        weight, out = self.target()[0], len(self.anchor.weight)
        bias = self.bias(weight)
        return Affine(ranks.assembled(weight, out), None if bias is None else ranks.assembled(bias, out))

    def anchor_loss(self) -> Tensor:
        """`loss` of the anchor, which the sums hold as it is."""
        return self._without_mean(self._sums.constant[self.rows])

    def loss(self, weight: Tensor) -> Tensor:
        """J of a weight (rows, in) with its best bias, by row.

        As J(W*) + tr (Q - W*) H (Q - W*)', so that a small loss is no difference of large numbers; D H D' in J(W*) is
        what W* was solved for.
        """
        target, solved = self.target()
        delta, S = target - self._own, self._sums.S
        error = weight.double() - target
        damping = 0.0 if solved is None else solved.damping * float(self.hessian.diagonal().mean())
        slope = -2 * (S if solved is None else damping * delta)  # of J at W*, as D (H + damping) = S
        loss = self._sums.constant[self.rows] - (delta * (S - slope / 2)).sum(1) + (error * slope).sum(1)
        return self._without_mean(loss + self._energy_of(error))

    def energy(self) -> Tensor:
        """sum_t s_t || X_t W_t' ||^2 by row (rows,).

        W W' = A A' + (W - A)(W + A)' in the product with X'X, so that beyond what each task adds anyway there is one
        product and not one for each task.
        """
        centred = (self._own @ self._h).square() / self._N if self._centred else 0.0
        own = self._energy_of(self._own) + centred - self._lam * self._own.square().sum(1)
        return self._sums.beyond[self.rows] + own

    def _without_mean(self, loss: Tensor) -> Tensor:
        return loss - self._sums.u[self.rows].square() / self._N if self._centred else loss

    def _energy_of(self, weight: Tensor) -> Tensor:
        """w H w' of each row w, in the anchor's type."""
        if not weight.any():
            return torch.zeros_like(weight[:, 0])
        W = weight.to(self.anchor.weight.dtype)
        return ((W @ self.hessian.to(W.dtype)) * W).sum(1).double()
