"""Statistics of a linear's inputs and targets. Moments are sums over tokens: they add up over batches, processes and
machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_cli.ranks import added

PANEL = 512  # columns of a symmetric product made at a time, from the diagonal down


def real_tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (tokens, width) of an activation (samples, tokens, width) or (samples, width); `mask` (samples, tokens)
    drops padding."""
    return inputs.flatten(0, -2) if mask is None else inputs[mask]


class Products:
    """The sum over rows of a b' for rows a (tokens, high) and b (tokens, wide), (high, wide) in float64.

    The product of each batch is made in the type of its rows. Sums of such numbers in float64 are exact but for the
    rarest of cases, so that they do not drift, and do not depend on which process had which batch.
    """

    def __init__(self) -> None:
        self._total = torch.zeros((), dtype=torch.float64)

    def add(self, a: Tensor, b: Tensor) -> None:
        """A batch."""
        self._room(a, b).add_(a.T @ b)

    def add_square(self, a: Tensor) -> None:
        """A batch with a for b: half the work, since only the lower triangle is made."""
        total = self._room(a, a)
        for start in range(0, a.shape[1], PANEL):
            end = start + PANEL
            total[start:, start:end] += a[:, start:].T @ a[:, start:end]

    def total(self) -> Tensor:
        """The sum over the rows of all processes, to be asked for once; a zero of no shape before any row."""
        return added(self._total) if self._total.ndim else self._total

    def square(self) -> Tensor:
        """The sum of what `add_square` added."""
        total = self.total()
        for end in range(PANEL, len(total) if total.ndim else 0, PANEL):
            total[end - PANEL : end, end:] = total[end:, end - PANEL : end].T
        return total

    def _room(self, a: Tensor, b: Tensor) -> Tensor:
        if not self._total.ndim:
            self._total = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float64)
        return self._total


@dataclass
class Moments:
    """One task's sums for linears that read the same input x (in), each token weighted by w; all in float64.

    `xx` sum w x x' (in, in), `x` sum w x (in), `tokens` sum w. For each linear the part p (out) of its target that is
    no weight times x: `px` sum w p x' (out, in), `p` sum w p (out), `pp` sum w p'p; zeros of no shape where there is
    none.
    """

    xx: Tensor
    x: Tensor
    tokens: float
    px: list[Tensor]
    p: list[Tensor]
    pp: list[Tensor]


class Measure:
    """Sums up one task's moments, batch by batch, for so many linears."""

    def __init__(self, linears: int) -> None:
        self._xx, self._dx, self._dd = Products(), Products(), Products()
        self._px = [Products() for _ in range(linears)]
        zero = torch.zeros((), dtype=torch.float64)
        self._x, self._d, self.tokens = zero, zero, 0.0
        self._p, self._pp = [zero.clone() for _ in range(linears)], [zero.clone() for _ in range(linears)]

    def add(self, rows: Tensor, parts: Sequence[Tensor | None], weights: Tensor | None) -> None:
        """Rows x (tokens, in), the parts p (tokens, out) or None for zeros, and weights w (tokens,) or None for 1."""
        weighted = self._add_inputs(rows, weights)
        for index, part in enumerate(parts):
            if part is not None:
                self._px[index].add(part, weighted)
                self._p[index] = self._p[index] + (part.sum(0) if weights is None else weights @ part).double()
                square = part.square() if weights is None else part.square() * weights[:, None]
                self._pp[index] = self._pp[index] + square.sum().double()

    def add_drift(self, rows: Tensor, drift: Tensor, weights: Tensor | None) -> None:
        """Rows x, and how far the teacher's are from them, both (tokens, in), for parts that are a weight times the
        drift: less work than the parts themselves where the linears are wider than x."""
        weighted = self._add_inputs(rows, weights)
        self._dx.add(drift, weighted)
        self._dd.add_square(drift if weights is None else drift * weights[:, None].sqrt())
        self._d = self._d + (drift.sum(0) if weights is None else weights @ drift).double()

    def moments(self, factors: Sequence[Tensor] | None = None) -> Moments:
        """The sums over all that was added by all processes, to be asked for once.

        `factors` (out, in): what the drift is to be multiplied with to give each linear's part.
        """
        xx, dx, dd = self._xx.square(), self._dx.total(), self._dd.square()
        x, d = added(self._x), added(self._d)
        px = [products.total() for products in self._px]
        p, pp = [added(part) for part in self._p], [added(part) for part in self._pp]
        if factors is not None:
            dx, d, dd = (part.to(factors[0].dtype) for part in (dx, d, dd))
            px, p = [(W @ dx).double() for W in factors], [(W @ d).double() for W in factors]
            pp = [((W @ dd) * W).sum().double() for W in factors]
        return Moments(xx, x, float(added(torch.tensor(self.tokens, dtype=torch.float64))), px, p, pp)

    def _add_inputs(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Adds to the sums of x alone; the rows, each times its weight."""
        self._xx.add_square(rows if weights is None else rows * weights[:, None].sqrt())
        weighted = rows if weights is None else rows * weights[:, None]
        self._x = self._x + weighted.sum(0).double()
        self.tokens += len(rows) if weights is None else float(weights.sum())
        return weighted


def task_weight(moment: Tensor, tokens: float, kind: str) -> float:
    """s_t: `frobenius` 1 / ||X'X||_F, so that tasks of different scale count alike; `tokens` 1 / tokens. 0 for no
    signal."""
    size = float(torch.linalg.norm(moment)) if kind == "frobenius" else tokens
    return 1 / size if size > 0 else 0.0
