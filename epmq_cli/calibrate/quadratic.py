"""The quadratic problem that the sums of objective.py define, and its solution: W*, biases and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epmq_cli.calibrate.row_pieces import row_pieces
from epmq_cli.calibrate.sharing import ALONE, Sharing
from epmq_cli.quantize.linalg import cholesky_solve, condition, damped_cholesky

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """A linear's weight (out, in), and its bias (out,); None without bias."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def stacked(cls, parts: Sequence[Affine]) -> Affine:
        """Linears that read the same input as one linear, with a bias if all have one."""
        biases = [part.bias for part in parts if part.bias is not None]
        weight = parts[0].weight if len(parts) == 1 else torch.cat([part.weight for part in parts])
        return cls(weight, torch.cat(biases) if len(biases) == len(parts) else None)


@dataclass(frozen=True)
class SolveInfo:
    """Facts about the factor of H: the damping, relative to its mean diagonal, the number of times it was raised, and
    the condition number with it (estimated from below; None if nothing had to be solved or it was not asked for)."""

    damping: float
    retries: int
    condition: float | None


@dataclass(frozen=True)
class QuadraticProblem:
    """J of a linear, or of several stacked ones that read the same input, in the letters of objective.py, in float64.

    `H` (in, in) and `S` (out, in), centred if `intercepts` (biases are free); `h` (in,) and `u` (out,); `per_token`
    1 / (N + lam), or 0 without intercepts. By row: `constant`, J of the anchor with the anchor's bias, and `beyond`,
    the energy of the experts' outputs minus that of the anchor's. `rows`: the rows whose biases and losses this process
    computes, from weights (rows, in).
    """

    anchor: Affine
    H: Tensor
    S: Tensor
    h: Tensor
    u: Tensor
    per_token: float
    intercepts: bool
    lam: float
    constant: Tensor
    beyond: Tensor
    rows: slice

    def solve(self, conditioned: bool = True) -> tuple[Tensor, SolveInfo | None]:
        """W* (out, in) and facts about the factor of H; the anchor if S is 0, the anchor and None if H has no factor.

        Columns whose input is always zero keep the anchor's value. `conditioned`: whether to estimate the condition
        number.
        """
        weight, dead = self.anchor.weight.to(torch.float64, copy=True), self.H.diagonal() == 0
        if not self.S.any():
            return weight, SolveInfo(0.0, 0, None)
        factor = damped_cholesky(self.H, 0.0, ridge=dead.to(self.H.dtype) if dead.any() else None)
        if factor is None:
            return weight, None
        for rows in row_pieces(slice(0, len(weight)), weight.shape[1]):
            weight[rows] += cholesky_solve(factor.lower, self.S[rows].T).T
        number = condition(self.H, factor) if conditioned else None
        return weight, SolveInfo(factor.damping, factor.retries, number)

    def solution(self, sharing: Sharing = ALONE) -> Affine:
        """W* and its best biases, of all rows; `sharing`: the objective's."""
        weight = self.solve(conditioned=False)[0]
        bias = self.bias(weight[self.rows])
        return Affine(weight, None if bias is None else sharing.all_gather_rows(bias, len(weight)))

    def bias(self, weight: Tensor) -> Tensor | None:
        """The best bias (rows,) for a weight; None without intercepts.

        It also compensates the mean of the quantization error.
        """
        if not self.intercepts or self.anchor.bias is None:
            return None
        moved = self.u[self.rows] - self._by_pieces(
            lambda rows: (self._own(weight, rows).double() - self.anchor.weight[rows].double()) @ self.h
        )
        return self.anchor.bias[self.rows].double() + self.per_token * moved

    def anchor_loss(self) -> Tensor:
        """`loss` of the anchor, directly from the sums."""
        return self._at_best_bias(self.constant[self.rows])

    def loss(self, weight: Tensor, target: Tensor, solved: SolveInfo | None) -> Tensor:
        """J of a weight with its best bias, by row (rows,); `target` and `solved`: the results of `solve`.

        Computed as J(W*) + tr (Q - W*) H (Q - W*)', so that a small loss is not a difference of large numbers; D H in
        J(W*) comes from the equations that W* solves.
        """
        damping = 0.0 if solved is None else solved.damping * float(self.H.diagonal().mean())
        H = self.H.to(self.anchor.weight.dtype)

        def of_rows(rows: slice) -> Tensor:
            best, S = target[rows], self.S[rows]
            delta, error = best - self.anchor.weight[rows].double(), self._own(weight, rows).double() - best
            slope = -2 * (S if solved is None else damping * delta)  # of J at W*, as D (H + damping) = S
            loss = self.constant[rows] - (delta * (S - slope / 2)).sum(1) + (error * slope).sum(1)
            return loss + _energy(error, H)

        return self._at_best_bias(self._by_pieces(of_rows))

    def energy(self) -> Tensor:
        """sum_t s_t || X_t W_t' ||^2 by row (rows,).

        With W W' = A A' + (W - A)(W + A)' in the product with X'X, A A' takes one product for all tasks together, and
        `beyond` reuses the products of the sums.
        """
        H = self.H.to(self.anchor.weight.dtype)

        def of_rows(rows: slice) -> Tensor:
            own = self.anchor.weight[rows].double()
            centred = self.per_token * (own @ self.h).square()
            return self.beyond[rows] + (_energy(own, H) + centred - self.lam * own.square().sum(1))

        return self._by_pieces(of_rows)

    def _by_pieces(self, compute: Callable[[slice], Tensor]) -> Tensor:
        """The results for this process's rows (rows,), computed for pieces of them."""
        return torch.cat([compute(rows) for rows in row_pieces(self.rows, self.anchor.weight.shape[1])])

    def _own(self, weight: Tensor, rows: slice) -> Tensor:
        """Rows of a weight that holds this process's rows alone."""
        first = self.rows.start or 0
        return weight[rows.start - first : rows.stop - first]

    def _at_best_bias(self, loss: Tensor) -> Tensor:
        return loss - self.per_token * self.u[self.rows].square()


def _energy(weight: Tensor, H: Tensor) -> Tensor:
    """w H w' of each row w, in the type of H."""
    if not weight.any():
        return torch.zeros_like(weight[:, 0])
    W = weight.to(H.dtype)
    return ((W @ H) * W).sum(1).double()
