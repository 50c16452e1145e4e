"""Integers: `bits` bits from -2^(bits-1) to 2^(bits-1) - 1, as compressed-tensors stores them.

A code q represents (q - zero) scale. Without zero points the zero is 0. Whole zero points are codes themselves; real
ones, which HQQ (https://mobiusml.github.io/hqq_blog/) solves for, are any numbers. W8A8 has 8 bits and one scale per
row, and engines round the inputs to 8 bits with a scale per token, so that they multiply integers
(https://arxiv.org/abs/2206.01861).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epmq_cli.config.validate import check_choice
from epmq_cli.quantize.formats.format import (
    Activations,
    Grid,
    PlainScales,
    ZeroPoints,
    check_group_size,
    fit_grid,
    stored_scale,
)

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class IntFormat(PlainScales):
    """`quant.format=int`, or `w8a8` and `w4a8` with activations; see NumberFormat."""

    bits: int
    group_size: int
    zero_points: ZeroPoints
    activations: Activations = "none"

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, BITS)
        check_group_size(self.group_size)
        check_choice("zero_points", self.zero_points, ("none", "whole", "real"))
        check_choice("activations", self.activations, ("none", "int8"))

    @property
    def name(self) -> str:
        """int4, and so on; w4a8 and w8a8 with activations."""
        return f"int{self.bits}" if self.activations == "none" else f"w{self.bits}a8"

    @property
    def storage(self) -> torch.dtype:
        """int8 at all bits: packing is the exporter's task."""
        return torch.int8

    @property
    def mirrored(self) -> bool:
        """True with zero points, which shift the range; otherwise the lowest code has no positive counterpart."""
        return self.zero_points != "none"

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def fit(self, groups: Tensor, search: str, dtype: torch.dtype) -> Grid:
        """See NumberFormat."""
        return fit_grid(groups, self, search, dtype)

    def span(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Grid:
        """See NumberFormat."""
        scale = stored_scale((high - low) / (self.highest - self.lowest), dtype)
        if self.zero_points == "none":
            return Grid(scale, None)
        zero = self.lowest - (torch.round(low / scale) if self.zero_points == "whole" else low / scale)
        return Grid(scale, zero.clamp(self.lowest, self.highest))

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        """See NumberFormat."""
        if grid.zero is None:
            codes = torch.round(x / grid.scale)
        elif self.zero_points == "real":
            codes = torch.round(x / grid.scale + grid.zero)
        else:
            codes = torch.round(x / grid.scale) + grid.zero
        return codes.clamp(self.lowest, self.highest).to(self.storage)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """See NumberFormat."""
        exact = codes.to(grid.scale.dtype)
        return exact * grid.scale if grid.zero is None else (exact - grid.zero) * grid.scale
