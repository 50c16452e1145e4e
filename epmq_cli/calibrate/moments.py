"""Moments of a linear's inputs and targets: sums over tokens, which add up over batches, processes and machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epmq_cli.calibrate.row_pieces import cached_pieces, row_pieces
from epmq_cli.calibrate.sharing import ALONE, Sharing
from epmq_cli.runtime.products import fast_products

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 512  # columns of a symmetric product computed at a time, from the diagonal down


def real_tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (tokens, width) of an activation (samples, tokens, width), flattened (samples tokens, width), or
    (samples, width); `mask` (samples, tokens) drops padding, which the last does not have."""
    if mask is None or inputs[..., 0].numel() != mask.numel():
        return inputs.flatten(0, -2)
    return inputs.reshape(*mask.shape, -1)[mask]


def tokens_of(samples: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Which of `count` rows of `real_tokens` are of some samples, (tokens,); `samples`: a mask (samples,)."""
    if mask is None or count == len(samples):
        return samples.repeat_interleave(count // len(samples))
    return samples[:, None].expand(mask.shape)[mask]


class Products:
    """The sum over rows of a b' for rows a (tokens, high) and b (tokens, wide), (high, wide) in float64.

    The product of each batch is computed in the type of its rows. Their sum in float64 is almost always
    exact, so it does not drift, and does not depend on the distribution of batches over processes.
    """

    def __init__(self, sharing: Sharing) -> None:
        self._total, self._sharing = torch.zeros((), dtype=torch.float64), sharing

    @fast_products()
    def add(self, a: Tensor, b: Tensor) -> None:
        """Adds a batch."""
        product = a.T @ b
        if self._total.ndim:
            self._total += product
        else:
            self._total = product.double()

    @fast_products()
    def add_square(self, a: Tensor) -> None:
        """Adds a batch with b = a; half the work, because only the lower triangle is computed."""
        first, width = not self._total.ndim, a.shape[1]
        if first:
            self._total = a.new_empty(width, width, dtype=torch.float64)
        for start in range(0, width, PANEL):
            panel, product = self._total[start:, start : start + PANEL], a[:, start:].T @ a[:, start : start + PANEL]
            panel.copy_(product) if first else panel.add_(product)

    def rows(self) -> Tensor:
        """This process's rows of the sum over all processes; call it once. A scalar zero if no row was added."""
        return self._sharing.reduce_rows(self._total) if self._total.ndim else self._total

    def square_rows(self) -> Tensor:
        """`rows` of the sum of `add_square`."""
        for end in range(PANEL, len(self._total) if self._total.ndim else 0, PANEL):
            self._total[end - PANEL : end, end:] = self._total[end:, end - PANEL : end].T
        return self.rows()


@dataclass
class Moments:
    """One task's sums for the inputs x (in) of a linear, each token weighted by w, and for the part p (out) of its
    target that is not a linear function of x; all in float64.

    `xx` sum w x x' (in, in) and `xp` sum w x p' (in, out): each process has its own rows of these. `norm` ||sum w x
    x'||_F, `x` sum w x (in), `tokens` sum w, `p` sum w p (out), `pp` sum w p^2 (out). Without a part, `xp`, `p` and
    `pp` are scalar zeros.
    """

    xx: Tensor
    norm: float
    x: Tensor
    tokens: float
    xp: Tensor
    p: Tensor
    pp: Tensor


class Measure:
    """Accumulates one task's moments, batch by batch; `sharing`: splits them over processes."""

    def __init__(self, sharing: Sharing = ALONE) -> None:
        self._sharing = sharing
        self._xx, self._xp, self._dd = Products(sharing), Products(sharing), Products(sharing)
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
        """Rows x and the teacher's rows minus x, both (tokens, in), for a part that is a weight times this drift; less
        work than the part itself if the linear is wider than x."""
        self._add_part(self._add_inputs(rows, weights), drift, weights)
        self._dd.add_square(drift if weights is None else drift * weights[:, None].sqrt())

    @fast_products()
    def moments(self, factor: Tensor | None = None) -> Moments:
        """The sums over the rows of all processes; call it once.

        `factor` (out, in): the weight that turns the drift into the part.
        """
        shared = self._sharing
        xx, xp = self._xx.square_rows(), self._xp.rows()
        p, pp = shared.all_reduce(self._p), shared.all_reduce(self._pp)
        if factor is not None:
            xp, pp = self._of_part(xp, self._dd.square_rows().to(factor.dtype), factor)
            p = (factor @ p.to(factor.dtype)).double()
        norm = frobenius(shared, xx)
        tokens = float(shared.all_reduce(torch.tensor(self.tokens, dtype=torch.float64)))
        return Moments(xx, norm, shared.all_reduce(self._x), tokens, xp, p, pp)

    def _of_part(self, xd: Tensor, dd: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """`xp` and `pp` of the part, from the sums x d' and d d' over drifts d."""
        own, xd = self._sharing.row_range(factor.shape[1]), xd.to(factor.dtype)
        xp, pp = xd.new_empty(len(xd), len(factor), dtype=torch.float64), []
        for rows in row_pieces(slice(0, len(factor)), factor.shape[1]):
            W = factor[rows]
            xp[:, rows] = xd @ W.T
            pp.append(((W @ dd.T) * W[:, own]).sum(1).double())
        return xp, self._sharing.all_reduce(torch.cat(pp))

    def _add_inputs(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Adds to the sums of x alone; returns each row times its weight."""
        self._xx.add_square(rows if weights is None else rows * weights[:, None].sqrt())
        weighted = rows if weights is None else rows * weights[:, None]
        self._x = self._x + weighted.sum(0).double()
        self.tokens += len(rows) if weights is None else float(weights.sum())
        return weighted

    def _add_part(self, weighted: Tensor, part: Tensor, weights: Tensor | None) -> None:
        self._xp.add(weighted, part)
        self._p = self._p + (part.sum(0) if weights is None else weights @ part).double()


def frobenius(sharing: Sharing, *parts: Tensor) -> float:
    """||sum w x x'||_F from this process's rows of the sum, or of sums over parts of the tokens."""
    first, *others = parts
    norms = [
        torch.linalg.vector_norm(sum((part[rows] for part in others), first[rows]), dim=1)
        for rows in cached_pieces(first)
    ]
    return float(sharing.all_gather_rows(torch.cat(norms), first.shape[1]).norm())


def task_weight(norm: float, tokens: float, kind: str) -> float:
    """s_t: `frobenius` 1 / ||X'X||_F, so that tasks of different scale have equal weight; `tokens` 1 / tokens. 0 for
    inputs that are all 0."""
    size = norm if kind == "frobenius" else tokens
    return 1 / size if size > 0 else 0.0
