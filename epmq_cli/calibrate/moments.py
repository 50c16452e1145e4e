"""Statistics of a linear's inputs and targets. Moments are sums over tokens: they add up over batches, processes and
machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 1 << 14  # tokens whose products are summed in the type of the rows; beyond that sums are in float64
PANEL = 512  # columns of a symmetric product made at a time, from the diagonal down


def real_tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (tokens, width) of an activation (samples, tokens, width) or (samples, width); `mask` (samples, tokens)
    drops padding."""
    return inputs.flatten(0, -2) if mask is None else inputs[mask]


class Products:
    """The sum over rows of a b' for rows a (tokens, high) and b (tokens, wide): `total` (high, wide) in float64.

    Up to `ROWS` rows it is made in their own type in place, so that nothing but the products costs time; then the sum
    goes on in float64, so that it does not drift with their number.
    """

    def __init__(self) -> None:
        self._partial: Tensor | None = None
        self._total = torch.zeros((), dtype=torch.float64)
        self._rows = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Some more rows."""
        self._room(a, b).addmm_(a.T, b)
        self._flush(len(a))

    def add_square(self, a: Tensor) -> None:
        """Some more rows, with a for b: half the work, since only the lower triangle is made."""
        into = self._room(a, a)
        for start in range(0, a.shape[1], PANEL):
            end = start + PANEL
            into[start:, start:end].addmm_(a[:, start:].T, a[:, start:end])
        self._flush(len(a))

    def total(self) -> Tensor:
        """The sum; a zero of no shape before any row."""
        self._flush(ROWS)
        return self._total

    def square(self) -> Tensor:
        """The sum of what `add_square` added."""
        lower = self.total()
        return lower.tril() + lower.tril(-1).T if lower.ndim else lower

    def _room(self, a: Tensor, b: Tensor) -> Tensor:
        if self._partial is None:
            self._partial = a.new_zeros(a.shape[1], b.shape[1])
        return self._partial

    def _flush(self, rows: int) -> None:
        self._rows += rows
        if self._rows >= ROWS and self._partial is not None:
            self._total = self._total.add_(self._partial) if self._total.ndim else self._partial.double()
            self._partial, self._rows = None, 0


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
        self._p, self._pp = [zero] * linears, [zero] * linears

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
        """The sums over all that was added; `factors` (out, in): what the drift is to be multiplied with to give each
        linear's part."""
        xx, dx, dd = self._xx.square(), self._dx.total(), self._dd.square()
        px, p, pp = [products.total() for products in self._px], self._p, self._pp
        if factors is not None:
            weights = [factor.double() for factor in factors]
            px, p = [W @ dx for W in weights], [W @ self._d for W in weights]
            pp = [((W @ dd) * W).sum() for W in weights]
        return Moments(xx, self._x, self.tokens, px, p, pp)

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
