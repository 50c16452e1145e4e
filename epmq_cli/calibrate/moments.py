"""Statistics of a linear's inputs and targets. Moments are sums over tokens: they add up over batches, processes and
machines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def real_tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (tokens, width) of an activation (samples, tokens, width) or (samples, width); `mask` (samples, tokens)
    drops padding."""
    return inputs.flatten(0, -2) if mask is None else inputs[mask]


class Moments:
    """One task's sums for linears that read the same input x (in), each token weighted by w.

    `xx` sum w x x' (in, in), `x` sum w x (in), `tokens` sum w. For each linear the part p (out) of its target that is
    no weight times x: `px` sum w p x' (out, in), `p` sum w p (out), `pp` sum w p'p; all zero until a `part` is given.
    Products are made in the type of the rows and summed in float64, so that the result does not drift with their
    number.
    """

    def __init__(self, width: int, outs: Sequence[int], device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.xx, self.x, self.tokens = zeros(width, width), zeros(width), 0.0
        self.px, self.p, self.pp = [zeros(out, width) for out in outs], [zeros(out) for out in outs], [0.0] * len(outs)

    def add(self, rows: Tensor, parts: Sequence[Tensor | None], weights: Tensor | None) -> None:
        """Rows x (tokens, in), the parts p (tokens, out) or None for zeros, and weights w (tokens,) or None for 1."""
        weighted = rows if weights is None else rows * weights[:, None]
        self.xx += weighted.T @ rows
        self.x += weighted.sum(0)
        self.tokens += len(rows) if weights is None else float(weights.sum())
        for index, part in enumerate(parts):
            if part is not None:
                self.px[index] += part.T @ weighted
                self.p[index] += part.sum(0) if weights is None else weights @ part
                self.pp[index] += float((part * (part if weights is None else part * weights[:, None])).sum())


def task_weight(moment: Tensor, tokens: float, kind: str) -> float:
    """s_t: `frobenius` 1 / ||X'X||_F, so that tasks of different scale count alike; `tokens` 1 / tokens. 0 for no
    signal."""
    size = float(torch.linalg.norm(moment)) if kind == "frobenius" else tokens
    return 1 / size if size > 0 else 0.0
