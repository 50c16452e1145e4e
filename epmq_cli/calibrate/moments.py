"""Statistics of a linear's inputs and targets. Moments are sums over tokens: they add up over batches, processes and
machines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_cli.runtime import distributed

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

    def rows(self) -> Tensor:
        """This process's rows of the sum over all processes, to be asked for once; a zero of no shape before any
        row."""
        return distributed.reduce_rows(self._total) if self._total.ndim else self._total

    def square_rows(self) -> Tensor:
        """`rows` of what `add_square` added."""
        for end in range(PANEL, len(self._total) if self._total.ndim else 0, PANEL):
            self._total[end - PANEL : end, end:] = self._total[end:, end - PANEL : end].T
        return self.rows()

    def _room(self, a: Tensor, b: Tensor) -> Tensor:
        if not self._total.ndim:
            self._total = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float64)
        return self._total


@dataclass
class Moments:
    """One task's sums for a linear's input x (in), each token weighted by w, and the part p (out) of its target that is
    no weight times x; all in float64.

    Of matrices each process has its own rows (`ranks.rows`): `xx` of sum w x x' (in, in), `xp` of sum w x p' (in, out).
    `norm` ||sum w x x'||_F, `x` sum w x (in), `tokens` sum w, `p` sum w p (out), `pp` sum w p^2 (out). Without a part
    `xp`, `p` and `pp` are zeros of no shape.
    """

    xx: Tensor
    norm: float
    x: Tensor
    tokens: float
    xp: Tensor
    p: Tensor
    pp: Tensor


class Measure:
    """Sums up one task's moments, batch by batch."""

    def __init__(self) -> None:
        self._xx, self._xp, self._dd = Products(), Products(), Products()
        zero = torch.zeros((), dtype=torch.float64)
        self._x, self._p, self._pp, self.tokens = zero, zero.clone(), zero.clone(), 0.0

    def add(self, rows: Tensor, part: Tensor | None, weights: Tensor | None) -> None:
        """Rows x (tokens, in), the part p (tokens, out) or None for zeros, and weights w (tokens,) or None for 1."""
        weighted = self._add_inputs(rows, weights)
        if part is not None:
            self._add_part(weighted, part, weights)
            square = part.square()
            self._pp = self._pp + (square.sum(0) if weights is None else weights @ square).double()

    def add_drift(self, rows: Tensor, drift: Tensor, weights: Tensor | None) -> None:
        """Rows x, and how far the teacher's are from them, both (tokens, in), for a part that is a weight times the
        drift: less work than the part itself where the linear is wider than x."""
        self._add_part(self._add_inputs(rows, weights), drift, weights)
        self._dd.add_square(drift if weights is None else drift * weights[:, None].sqrt())

    def moments(self, factor: Tensor | None = None) -> Moments:
        """The sums over all that was added by all processes, to be asked for once.

        `factor` (out, in): what the drift is to be multiplied with to give the part.
        """
        xx, xp, p, pp = (
            self._xx.square_rows(),
            self._xp.rows(),
            distributed.all_reduce(self._p),
            distributed.all_reduce(self._pp),
        )
        if factor is not None:
            own, W = distributed.row_range(factor.shape[1]), factor
            drift, xp = self._dd.square_rows().to(W.dtype), (xp.to(W.dtype) @ W.T).double()
            p = (W @ p.to(W.dtype)).double()
            pp = distributed.all_reduce(((W @ drift.T) * W[:, own]).sum(1).double())
        norm = float(distributed.all_gather_rows(torch.linalg.vector_norm(xx, dim=1), len(self._x)).norm())
        tokens = float(distributed.all_reduce(torch.tensor(self.tokens, dtype=torch.float64)))
        return Moments(xx, norm, distributed.all_reduce(self._x), tokens, xp, p, pp)

    def _add_inputs(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Adds to the sums of x alone; the rows, each times its weight."""
        self._xx.add_square(rows if weights is None else rows * weights[:, None].sqrt())
        weighted = rows if weights is None else rows * weights[:, None]
        self._x = self._x + weighted.sum(0).double()
        self.tokens += len(rows) if weights is None else float(weights.sum())
        return weighted

    def _add_part(self, weighted: Tensor, part: Tensor, weights: Tensor | None) -> None:
        self._xp.add(weighted, part)
        self._p = self._p + (part.sum(0) if weights is None else weights @ part).double()


def task_weight(norm: float, tokens: float, kind: str) -> float:
    """s_t: `frobenius` 1 / ||X'X||_F, so that tasks of different scale count alike; `tokens` 1 / tokens. 0 for no
    signal."""
    size = norm if kind == "frobenius" else tokens
    return 1 / size if size > 0 else 0.0
