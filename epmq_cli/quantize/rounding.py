"""Learned rounding of a quantized weight (AutoRound, https://arxiv.org/abs/2309.05516), from any integers.

With the scale s and the zero point z of a group, a weight becomes

    Q = m s (q - z)        q = clamp(round(w / s + z + v))

v moves a weight to neighbouring integers; m is close to 1. Gradients pass through the rounding as if it was not there.
w starts at the target weight, but at most a quarter of a step away from the integer of the quantizer, so that v = 0 and
m = 1 give exactly that integer: error feedback, as in GPTQ, does not round to nearest.

Departures from the paper. m does not change the integers, which makes its gradient exact: with round(w / (m s) + z + v)
the error of blocks that GPTQ has quantized rises even at small learning rates. Weights do not start at their own place
between two integers, because those near the middle would change in the first steps, all at once; at 2 bits the error
does not recover. To reach both neighbours from a quarter of a step away, v needs a range of +-1 instead of +-0.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from epmq_cli.quantize.formats.format import QuantizedWeight, by_group
from epmq_cli.quantize.formats.int import IntFormat

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 0.25  # the most that w is away from its integer at the start, in steps
HALF = 0.5  # a step


class Learned(Protocol):
    """A tensor that signed gradient steps change."""

    def value(self) -> Tensor:
        """The tensor, as the checkpoint stores it."""

    def step(self, gradient: Tensor, share: float) -> None:
        """Moves against the signs of the gradient at `value()`; `share`: of the learning rate."""

    def state(self) -> tuple[Tensor, ...]:
        """Copies of the learned numbers."""

    def restore(self, state: tuple[Tensor, ...]) -> None:
        """Returns to an earlier state."""


def rounded(positions: Tensor, format: IntFormat) -> Tensor:
    """The codes nearest to positions among them."""
    return positions.round().clamp(format.lowest, format.highest)


def on_grid(positions: Tensor, format: IntFormat) -> Tensor:
    """Which positions round to a code without leaving the grid, so that gradients pass through the rounding."""
    return (positions > format.lowest - HALF) & (positions < format.highest + HALF)


@dataclass(frozen=True)
class RoundingOptions:
    """`lr`: the learning rate of v, which stays in [-reach, reach]; `scale_lr` of m, which stays in `clip`; a rate of 0
    fixes a number."""

    lr: float
    reach: float
    scale_lr: float
    clip: tuple[float, float]


class LearnedRounding:
    """The rounding of one linear. `target` (out, in): the weight that the quantizer approximated. `options`: of the
    learning."""

    def __init__(self, weight: QuantizedWeight, target: Tensor, options: RoundingOptions) -> None:
        assert isinstance(weight.format, IntFormat)
        self._start, self._format, self._options = weight, weight.format, options
        grid = weight.grid.over_columns()
        self._scale, self._zero = grid.scale, grid.zeros
        centred = by_group(weight.codes, weight.format).to(self._scale.dtype) - self._zero
        rest = by_group(target.to(self._scale.dtype), weight.format) / self._scale - centred
        self._steps = centred + rest.clamp(-MARGIN, MARGIN)  # w / s
        self._offsets, self._multipliers = torch.zeros_like(self._steps), torch.ones_like(self._scale)

    def weight(self) -> QuantizedWeight:
        """The quantized weight."""
        codes = rounded(self._positions(), self._format).reshape(self._start.shape).to(self._format.storage)
        return replace(self._start.rescaled(self._multipliers[..., 0]), codes=codes)

    def value(self) -> Tensor:
        """The dequantized weight (out, in)."""
        return self.weight().dequantize()

    def step(self, gradient: Tensor, share: float) -> None:
        """See Learned."""
        slope = by_group(gradient.to(self._scale.dtype), self._format)
        positions = self._positions()
        scale = self._start.rescaled(self._multipliers[..., 0]).grid.scale[..., None]
        codes, format = rounded(positions, self._format), self._format
        inside = on_grid(positions, format)
        by_scale, own = self._scale * (slope * (codes - self._zero)).sum(-1, True), self._options
        self._offsets -= share * own.lr * (slope * scale * inside).sign()
        self._offsets.clamp_(-own.reach, own.reach)
        self._multipliers -= share * own.scale_lr * by_scale.sign()
        self._multipliers.clamp_(*own.clip)

    def state(self) -> tuple[Tensor, ...]:
        """See Learned."""
        return self._offsets.clone(), self._multipliers.clone()

    def restore(self, state: tuple[Tensor, ...]) -> None:
        """See Learned."""
        self._offsets, self._multipliers = (part.clone() for part in state)

    def _positions(self) -> Tensor:
        """Where the weights lie among the codes, before rounding: (out, groups, columns)."""
        return self._steps + self._offsets + self._zero


class LearnedVector:
    """The gain or bias of a norm, or the bias of a linear. `start` (width,); `dtype`: the type in which the checkpoint
    stores it; `added`: the number that the model adds to it. The learning rate is relative to the root mean square of
    the sum; it is absolute if the sum is 0."""

    def __init__(self, start: Tensor, lr: float, dtype: torch.dtype, added: float = 0.0) -> None:
        self._start, self._lr, self._dtype = start, lr, dtype
        self._unit = float((start + added).square().mean().sqrt()) or 1.0
        self._moves = torch.zeros_like(start)

    def value(self) -> Tensor:
        """See Learned."""
        moved = (self._start + self._unit * self._moves).to(self._dtype).to(self._start.dtype)
        return torch.where(self._moves == 0, self._start, moved)

    def step(self, gradient: Tensor, share: float) -> None:
        """See Learned."""
        self._moves -= share * self._lr * gradient.to(self._moves.dtype).sign()

    def state(self) -> tuple[Tensor, ...]:
        """See Learned."""
        return (self._moves.clone(),)

    def restore(self, state: tuple[Tensor, ...]) -> None:
        """See Learned."""
        self._moves = state[0].clone()
