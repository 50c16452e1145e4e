"""Uniform integer grids: scale and zero point for each row and each group of input columns.

A grid of b bits has the integers -2^(b-1) .. 2^(b-1) - 1, as compressed-tensors stores them. A symmetric grid has its
zero point at 0. Scales are rounded to the type they are stored in before anything is quantized with them, so that the
integers are right for the scale that a reader of the checkpoint finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_cli.config.validate import check_choice
from epmq_cli.errors import ConfigError

BITS = (2, 3, 4, 8)
SEARCHES = ("minmax", "mse", "hessian")
SHRINKS = 80  # candidates of the mse search: the full range times 1.00, 0.99, ... 0.21


def widths_of(bits: object, symmetric: bool) -> tuple[int, ...]:
    """The widths that give this many bits on average: itself, or the two next to it; ConfigError where there are none.

    Two widths need symmetric grids: transformers reads others by way of its `dequantize` alone, which takes one width
    for all.
    """
    if bits in BITS and not isinstance(bits, bool):
        return (int(bits),)
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not BITS[0] < bits < BITS[-1]:
        named = ", ".join(map(str, BITS))
        raise ConfigError(f"bits must be one of {named}, or a number between them for a mix such as 3.5, got {bits!r}")
    if not symmetric:
        raise ConfigError(
            f"bits must be one of {', '.join(map(str, BITS))} with quant.symmetric=false, got {bits!r}; "
            "a mix of widths needs symmetric grids"
        )
    return max(width for width in BITS if width < bits), min(width for width in BITS if width > bits)


@dataclass(frozen=True)
class GridSpec:
    """What a grid shall be: `bits`; `group_size` in input columns, -1 for one group a row; symmetric or with zero
    points; `search`: `minmax` spans the group's range, `mse` shrinks that range to the least squared error, `hessian`
    to the least loss that GPTQ itself ends with (gptq.py; elsewhere as `mse`)."""

    bits: int
    group_size: int
    symmetric: bool
    search: str

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, BITS)
        if (
            not isinstance(self.group_size, int)
            or isinstance(self.group_size, bool)
            or self.group_size == 0
            or self.group_size < -1
        ):
            raise ConfigError(
                f"group_size must be a whole number of input columns above 0, or -1 for one group a row, "
                f"got {self.group_size!r}"
            )
        check_choice("quant.symmetric", self.symmetric, (True, False))
        check_choice("quant.grid", self.search, SEARCHES)

    @property
    def lowest(self) -> int:
        """The smallest integer of the grid."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1

    def columns(self, in_features: int) -> int:
        """Input columns in one group of a linear with this many."""
        return in_features if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class Grid:
    """`scale` and `zero`, each (out, groups) and of the weight's type; `zero` holds whole numbers."""

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on a grid: `values` int8 (out, in); `scale` and `zero` (out, groups) in float32.

    `dtype`: the type that the checkpoint stores scales in, and that its readers dequantize in.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor
    spec: GridSpec
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """The weight that the integers stand for, rounded to `dtype` as readers do, in float32 (out, in)."""
        rows, columns = self.values.shape
        groups = self.scale.shape[1]
        grouped = self.values.to(self.scale.dtype).reshape(rows, groups, columns // groups)
        exact = (grouped - self.zero[:, :, None]) * self.scale[:, :, None]
        return exact.to(self.dtype).to(exact.dtype).reshape(rows, columns)

    def split(self, rows: list[int]) -> list[QuantizedWeight]:
        """One weight for each count of rows, from the top; nothing is shared."""
        parts = zip(*(torch.split(part, rows) for part in (self.values, self.scale, self.zero)), strict=True)
        return [QuantizedWeight(v.clone(), s.clone(), z.clone(), self.spec, self.dtype) for v, s, z in parts]


@dataclass(frozen=True)
class DenseWeight:
    """A weight that no quantizer touched, float32 (out, in)."""

    weight: Tensor

    def dequantize(self) -> Tensor:
        """The weight itself."""
        return self.weight

    def split(self, rows: list[int]) -> list[DenseWeight]:
        """One weight for each count of rows, from the top; nothing is shared."""
        return [DenseWeight(part.clone()) for part in torch.split(self.weight, rows)]


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
    """The nearest integers of the grid, in the type of the weight; the three tensors broadcast."""
    return (torch.round(weight / scale) + zero).clamp(spec.lowest, spec.highest)


def find_grid(weight: Tensor, spec: GridSpec, dtype: torch.dtype) -> Grid:
    """The grid of each row and group of a weight (out, in); `dtype` is the type that scales are stored in.

    A group of equal zeros gets scale 1.
    """
    groups = by_group(weight, spec)
    low, high = range_of(groups, spec)
    best = grid_of_range(low, high, spec, dtype)
    if spec.search == "minmax":
        return best
    scale, zero = best.scale, best.zero
    least = _squared_error(groups, best, spec)
    for step in range(1, SHRINKS):
        shrink = 1 - step / 100
        grid = grid_of_range(shrink * low, shrink * high, spec, dtype)
        error = _squared_error(groups, grid, spec)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
    return Grid(scale, zero)


def by_group(weight: Tensor, spec: GridSpec) -> Tensor:
    """A weight (out, in) by the groups of its columns: (out, groups, columns)."""
    rows, width = weight.shape
    size = spec.columns(width)
    return weight.reshape(rows, width // size, size)


def range_of(groups: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group (..., columns), zero included; the same up and down where symmetric."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if not spec.symmetric:
        return low, high
    high = torch.maximum(-low, high)
    return -high, high


def grid_of_range(low: Tensor, high: Tensor, spec: GridSpec, dtype: torch.dtype) -> Grid:
    """The grid that spans a range, of any shape; a range of nothing gets scale 1."""
    scale = (high - low) / (spec.highest - spec.lowest)
    smallest = torch.finfo(dtype).tiny
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=smallest)).to(dtype).to(low.dtype)
    if spec.symmetric:
        return Grid(scale, torch.zeros_like(scale))
    return Grid(scale, (spec.lowest - torch.round(low / scale)).clamp(spec.lowest, spec.highest))


def _squared_error(groups: Tensor, grid: Grid, spec: GridSpec) -> Tensor:
    scale, zero = grid.scale[:, :, None], grid.zero[:, :, None]
    rounded = (quantize(groups, scale, zero, spec) - zero) * scale
    return (rounded - groups).square().sum(2)
