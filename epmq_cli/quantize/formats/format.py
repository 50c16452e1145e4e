"""Number formats of weights: their interface, and the data types that quantizers, exporters and readers share.

A format turns weights into codes and back. A group of input columns of one row shares a scale, and a zero point if
the format has them. Scales are rounded to the stored type before codes are chosen, so that the codes are optimal for
the stored scale. A grid holds the scale by which readers multiply: of a scale in two levels, both together.

To add a format, write a module with a frozen dataclass that implements `NumberFormat`, and list it in names.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, Self

import torch

from epmq_cli.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

ZeroPoints = Literal["none", "whole", "real"]
Activations = Literal["none", "int8", "fp8", "fp8_static", "fp8_group", "nvfp4", "mxfp4", "mxfp8"]
"""The formats that engines round a linear's inputs to at run time: none; int8 and fp8 with a scale a token; fp8_static
with one calibrated scale; fp8_group with a scale for 128 inputs of a token; nvfp4 with a calibrated global scale; or
MX."""
CALIBRATED: tuple[Activations, ...] = ("fp8_static", "nvfp4")
"""Those whose scale is measured on the inputs of each linear."""
SEARCHES = ("minmax", "mse")
SHRINKS = 80  # candidates of the mse search: the full range times 1.00, 0.99, ... 0.21


@dataclass(frozen=True)
class Grid:
    """Scales and zero points, of one shape: (out, groups) for a weight, (...) for groups (..., columns).

    `zero` is None in formats without zero points.
    """

    scale: Tensor
    zero: Tensor | None

    @property
    def zeros(self) -> Tensor:
        """The zero points; 0 in formats without them."""
        return torch.zeros_like(self.scale) if self.zero is None else self.zero

    @classmethod
    def cat(cls, parts: Sequence[Grid], dim: int) -> Grid:
        """Grids of one format as one, along a dimension."""
        zeros = [part.zero for part in parts if part.zero is not None]
        return cls(torch.cat([part.scale for part in parts], dim), torch.cat(zeros, dim) if zeros else None)

    def over_columns(self) -> Grid:
        """The grid with one more axis, so that (...) broadcasts against groups (..., columns)."""
        return Grid(self.scale[..., None], None if self.zero is None else self.zero[..., None])

    def where(self, better: Tensor, other: Grid) -> Grid:
        """This grid where `better` is true, the other one elsewhere."""
        scale = torch.where(better, self.scale, other.scale)
        if self.zero is None or other.zero is None:
            return Grid(scale, None)
        return Grid(scale, torch.where(better, self.zero, other.zero))


class NumberFormat(Protocol):
    """A number format, with its bits and the size of its groups. Formats are hashable; equal formats decode alike."""

    @property
    def name(self) -> str:
        """Its name for users, such as int4."""

    @property
    def bits(self) -> int:
        """The bits of one code."""

    @property
    def group_size(self) -> int:
        """The number of input columns that share a scale; -1 for one scale per row."""

    @property
    def zero_points(self) -> ZeroPoints:
        """The kind of its zero points."""

    @property
    def storage(self) -> torch.dtype:
        """The torch type of codes."""

    @property
    def mirrored(self) -> bool:
        """Whether the negative of every code is a code too. If not, a negative scale reaches other values."""

    @property
    def activations(self) -> Activations:
        """The format of a linear's inputs at run time."""

    @property
    def scale_bits(self) -> int | None:
        """The bits of a stored scale; None if scales are stored in the type of the checkpoint."""

    @property
    def row_block(self) -> int:
        """The number of output rows that share a scale; 1 in most formats. The first block starts at the first row of a
        linear; the last one may be smaller."""

    def for_range(self, largest: float) -> NumberFormat:
        """The format of one tensor whose largest magnitude is `largest`. It differs only in formats with a scale of the
        whole tensor."""

    def for_inputs(self, largest: float) -> NumberFormat:
        """The format of one linear whose inputs have the largest magnitude `largest`; the same unless its activations
        are `CALIBRATED`."""

    def fit(self, groups: Tensor, search: str, dtype: torch.dtype) -> Grid:
        """The grid (...) of groups (..., columns); `dtype` is the type that scales are stored in.

        `search`: `minmax` spans the range of each group, `mse` shrinks that range to minimize the squared error.
        """

    def span(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Grid:
        """The grid whose smallest and largest value are `low` <= 0 and `high` >= 0, of any shape."""

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        """The codes nearest to `x`, against which the grid broadcasts."""

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The numbers that codes represent, in the type of the scales; the grid broadcasts against the codes."""


class PlainScales:
    """The members of formats with scales in the type of the checkpoint and inputs that stay as they are."""

    @property
    def activations(self) -> Activations:
        """None: inputs are not rounded."""
        return "none"

    @property
    def scale_bits(self) -> int | None:
        """None: the type of the checkpoint."""
        return None

    @property
    def row_block(self) -> int:
        """1: rows have scales of their own."""
        return 1

    def for_range(self, largest: float) -> Self:
        """The format itself: no scale covers the whole tensor."""
        return self

    def for_inputs(self, largest: float) -> Self:
        """The format itself: no scale of the inputs is stored."""
        return self


def check_group_size(group_size: object) -> None:
    """ConfigError unless this is a valid group size."""
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not whole or group_size == 0 or group_size < -1:  # type: ignore[operator]
        raise ConfigError(
            f"group_size must be a whole number of input columns above 0, or -1 for one group a row, got {group_size!r}"
        )


def group_columns(format: NumberFormat, in_features: int) -> int:
    """The number of input columns of one group of a linear with this many inputs."""
    return in_features if format.group_size == -1 else format.group_size


def by_group(weight: Tensor, format: NumberFormat) -> Tensor:
    """A weight (out, in) as groups (out, groups, columns)."""
    rows, width = weight.shape
    size = group_columns(format, width)
    return weight.reshape(rows, width // size, size)


def fit_grid(groups: Tensor, format: NumberFormat, search: str, dtype: torch.dtype) -> Grid:
    """`NumberFormat.fit` for formats that have `span`: the full range, or the shrunk range with the least squared
    error."""
    low, high = range_of(groups, format)
    best = format.span(low, high, dtype)
    if search == "minmax":
        return best
    least = over_row_blocks(_squared_error(groups, best, format), format, torch.sum)
    for step in range(1, SHRINKS):
        shrink = 1 - step / 100
        grid = format.span(shrink * low, shrink * high, dtype)
        error = over_row_blocks(_squared_error(groups, grid, format), format, torch.sum)
        better = error < least
        least, best = torch.where(better, error, least), grid.where(better, best)
    return best


def range_of(groups: Tensor, format: NumberFormat) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight of each group (..., columns), zero included; (-high, high) without zero
    points, over all rows of a row block."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if format.zero_points != "none":
        return low, high
    high = over_row_blocks(torch.maximum(-low, high), format, torch.amax)
    return -high, high


def over_row_blocks(values: Tensor, format: NumberFormat, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Non-negative values (out, ...), each replaced by the sum or maximum (`reduce`) over the rows that share its
    scale."""
    size, rows = format.row_block, len(values)
    if size == 1:
        return values
    padded = torch.cat([values, values.new_zeros(-rows % size, *values.shape[1:])])
    reduced = reduce(padded.reshape(-1, size, *values.shape[1:]), 1)
    return reduced.repeat_interleave(size, 0)[:rows]


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to the type that they are stored in, at least its smallest normal number; 1 instead of 0."""
    normal = scale.clamp(min=torch.finfo(dtype).tiny)
    return torch.where(scale == 0, 1.0, normal).to(dtype).to(scale.dtype)


def in_single(number: float) -> float:
    """A number rounded to float32, as files store it; the largest one instead of infinity."""
    return min(float(torch.tensor(number, dtype=torch.float32)), torch.finfo(torch.float32).max)


def _squared_error(groups: Tensor, grid: Grid, format: NumberFormat) -> Tensor:
    own = grid.over_columns()
    return (format.decode(format.encode(groups, own), own) - groups).square().sum(-1)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in a number format: `codes` (out, in) in `format.storage`; `grid` (out, groups) in float32, also where
    rows share scales.

    `dtype`: the type that the checkpoint stores scales in, and that its readers dequantize in.
    """

    codes: Tensor
    grid: Grid
    format: NumberFormat
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """The weight that the codes represent, rounded to `dtype` as readers do, in float32 (out, in)."""
        exact = self.format.decode(by_group(self.codes, self.format), self.grid.over_columns())
        return exact.to(self.dtype).to(exact.dtype).reshape(self.shape)

    def to(self, device: torch.device) -> QuantizedWeight:
        """This weight on a device."""
        zero = None if self.grid.zero is None else self.grid.zero.to(device)
        return replace(self, codes=self.codes.to(device), grid=Grid(self.grid.scale.to(device), zero))

    def rescaled(self, factors: Tensor) -> QuantizedWeight:
        """This weight with its scales times the factors (out, groups), rounded to `dtype`. A scale that would become
        smaller than the smallest normal number stays as it is."""
        scale = self.grid.scale
        moved = (scale * factors).to(self.dtype).to(scale.dtype)
        normal = moved.abs() >= torch.finfo(self.dtype).tiny
        return replace(self, grid=Grid(torch.where(normal, moved, scale), self.grid.zero))

    def split(self, rows: list[int]) -> list[QuantizedWeight]:
        """One weight for each count of rows, from the top, with its own memory."""
        parts = [torch.split(self.codes, rows), torch.split(self.grid.scale, rows)]
        zeros = [None] * len(rows) if self.grid.zero is None else torch.split(self.grid.zero, rows)
        return [
            QuantizedWeight(c.clone(), Grid(s.clone(), None if z is None else z.clone()), self.format, self.dtype)
            for c, s, z in zip(*parts, zeros, strict=True)
        ]


@dataclass(frozen=True)
class DenseWeight:
    """A weight that stays dense, float32 (out, in)."""

    weight: Tensor

    def dequantize(self) -> Tensor:
        """The weight itself."""
        return self.weight

    def split(self, rows: list[int]) -> list[DenseWeight]:
        """One weight for each count of rows, from the top, with its own memory."""
        return [DenseWeight(part.clone()) for part in torch.split(self.weight, rows)]
