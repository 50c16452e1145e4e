"""The objective that calibration gives to a quantizer, and its unquantized optimum (E-PMQ,
https://arxiv.org/abs/2605.16882; with alpha, rho and intercepts FeatCal, https://arxiv.org/abs/2605.13030).

For one linear with anchor A, a and experts W_t, b_t; the student's inputs X_t and the targets Y_t,

    J(Q, b) = sum_t s_t || X_t Q' + b - Y_t ||_F^2  +  lam || Q - A ||_F^2  +  lam || b - a ||^2
    Y_t     = X_t W_t' + b_t + P_t        P_t = alpha (E_t - X_t) W_t' + beta (r_E - r_X).

The sums are in terms of D = Q - A and d = b - a, so that experts equal to the anchor give D = 0 to the last bit. With
the moments H = sum_t s_t X_t'X_t + lam I, h and u the weighted sums of the inputs and of Y_t - X_t A' - a, and N the
sum of the weights, the best intercept of any Q is d = (u - D h) / (N + lam), which gives

    J = tr D H D' - 2 tr D S' + c         H <- H - h h' / (N + lam)         S <- S - u h' / (N + lam)
    W* = A + S H^-1

and J(Q) = tr (Q - W*) H (Q - W*)' + const, which GPTQ minimises, given W* and H. Without intercepts h = 0.

Processes can split the work: each accumulates its own rows of H, columns of S and part of the vectors. Nothing of the
size of a weight is computed beside H and S but a piece of its rows.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from epmq_cli.calibrate.moments import Moments
from epmq_cli.calibrate.quadratic import Affine, QuadraticProblem
from epmq_cli.calibrate.row_pieces import cached_pieces, row_pieces
from epmq_cli.calibrate.sharing import ALONE, Sharing
from epmq_cli.runtime.products import fast_products


class Objective:
    """J of a linear, or of several stacked ones that read the same input, accumulated task by task in float64.

    `anchor`: in the type of large products. `intercepts`: whether the biases are free, if the anchor has them.
    `sharing`: splits the sums over processes; moments must use the same one. `waiting`: where H is while nothing is
    added to it, such as the CPU if the anchor is on a GPU without space for it; None for the anchor's device.
    """

    def __init__(
        self,
        anchor: Affine,
        lam: float,
        intercepts: bool,
        sharing: Sharing = ALONE,
        waiting: torch.device | None = None,
    ) -> None:
        out, width = anchor.weight.shape
        self._anchor, self._sharing = anchor, sharing
        self._rows, self._columns = sharing.row_range(out), sharing.row_range(width)
        self._intercepts, self._lam, self._N = intercepts and anchor.bias is not None, lam, lam
        zeros = partial(torch.zeros, dtype=torch.float64, device=anchor.weight.device)
        columns = len(range(width)[self._columns])
        self._S, self._h = zeros((out, columns)), zeros((width,))
        self._H = torch.zeros(columns, width, dtype=torch.float64, device=waiting or anchor.weight.device)
        self._H[:, self._columns].fill_diagonal_(lam)
        self._u, self._constant, self._beyond = zeros((out,)), zeros((out,)), zeros((out,))

    def plus(self, other: Objective) -> Objective:
        """The sum of two objectives with the same anchor, one of them with lam 0."""
        total = copy.copy(self)
        total._N, total._lam = self._N + other._N, self._lam + other._lam
        for name in ("_H", "_S", "_h", "_u", "_constant", "_beyond"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @fast_products()
    def add(self, moments: Moments, expert: Affine, s: float) -> None:
        """Adds a task with weight s_t: its moments, and the expert."""
        _add(self._H, moments.xx, s)
        self._h.add_(moments.x, alpha=s)
        self._N += s * moments.tokens
        own, shift, (out, width) = self._rows, torch.zeros_like(self._u), expert.weight.shape
        if self._intercepts and expert.bias is not None and self._anchor.bias is not None:
            shift = expert.bias.double() - self._anchor.bias.double()
            self._S.addr_(shift, moments.x[self._columns], alpha=s)
        sums = torch.cat([self._delta(expert, rows).double() @ moments.x for rows in row_pieces(own, width)])
        part, squares = (moments.p, moments.pp) if not moments.p.ndim else (moments.p[own], moments.pp[own])
        self._u[own] += s * (sums + shift[own] * moments.tokens + part)
        self._constant[own] += s * (squares + shift[own] * (moments.tokens * shift[own] + 2 * (sums + part)))
        for rows in row_pieces(slice(0, out), width):
            self._add_rows(rows, moments, expert, s)

    def _add_rows(self, rows: slice, moments: Moments, expert: Affine, s: float) -> None:
        """Adds what a task gives to some rows of S and of the losses."""
        delta, S = self._delta(expert, rows), self._S[rows]
        constant, beyond = self._constant[rows], self._beyond[rows]
        before, after = (W[rows, self._columns] for W in (self._anchor.weight, expert.weight))
        pushed = _pushed(delta, moments.xx) if delta.any() else None
        px = moments.xp.T[rows] if moments.xp.ndim else None
        for part in cached_pieces(S):
            if px is not None:
                S[part].add_(px[part], alpha=s)
            if pushed is not None:
                own, moved = pushed[part].double(), delta[part, self._columns]
                S[part].add_(own, alpha=s)
                constant[part].add_(((own if px is None else own + 2 * px[part]) * moved).sum(1), alpha=s)
                beyond[part].add_((own * (before[part] + after[part])).sum(1), alpha=s)

    def closed(self) -> QuadraticProblem:
        """The problem over the tasks and rows of all processes; call it once, at the end."""
        shared, width = self._sharing, len(self._h)
        H = shared.all_gather_rows(self._H.to(self._anchor.weight.device), width)
        S = self._S if shared.world_size() == 1 else shared.all_gather_rows(self._S.T.contiguous(), width).T
        u, constant, beyond = (shared.all_reduce(sums) for sums in (self._u, self._constant, self._beyond))
        per_token = 1 / self._N if self._intercepts and self._N > 0 else 0.0
        if per_token:
            H.addr_(self._h, self._h, alpha=-per_token)
            S.addr_(u, self._h, alpha=-per_token)
        return QuadraticProblem(
            anchor=self._anchor,
            H=H,
            S=S,
            h=self._h,
            u=u,
            per_token=per_token,
            intercepts=self._intercepts,
            lam=self._lam,
            constant=constant,
            beyond=beyond,
            rows=self._rows,
        )

    def _delta(self, expert: Affine, rows: slice) -> Tensor:
        """These rows of W_t - A."""
        delta: Tensor = expert.weight[rows] - self._anchor.weight[rows]
        return delta


def _add(total: Tensor, part: Tensor, s: float) -> None:
    """Adds s times the part to the total, with the operations of the part's device wherever the total is."""
    if total.device == part.device:
        total.add_(part, alpha=s)
        return
    for rows in row_pieces(slice(0, len(total)), total.shape[1]):
        total[rows] = total[rows].to(part.device).add_(part[rows], alpha=s)


def _pushed(delta: Tensor, xx: Tensor) -> Tensor:
    """delta X'X in the type of delta."""
    products = [delta @ xx[rows].to(delta.dtype).T for rows in row_pieces(slice(0, len(xx)), xx.shape[1])]
    return products[0] if len(products) == 1 else torch.cat(products, 1)
