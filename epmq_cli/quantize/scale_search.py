"""Fits GPTQ's grids to GPTQ's final loss instead of the squared error of the weights.

With U the upper factor of H^-1, quantizing the columns of a group one after the other costs sum_i ((w_i - q_i) /
U_ii)^2, where w_i includes the errors of the columns before it. This sum is computed for all candidate scales at once,
first over the whole range and then near the best. Zero points are then searched together with the scales, an idea of
NeUQI (https://arxiv.org/abs/2505.17595): all pairs near the best one, then nearer. The best pair so far is always among
them, so that the loss never rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epmq_cli.quantize.formats.format import Grid, NumberFormat, over_row_blocks, range_of, stored_scale
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.kernels.select import ColumnKernel

if TYPE_CHECKING:
    from torch import Tensor

COARSE = 16  # candidates: the full range times 1.00, 0.95, ... 0.25
STEP = 0.05
FINE = (-0.0225, -0.015, -0.0075, 0.0, 0.0075, 0.015, 0.0225, 0.03)  # added to the best coarse one
FACTORS = (1.0, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3), (1.0, 0.955, 0.97, 0.985, 1.015, 1.03, 1.045)  # of the best scale
SHIFTS = (0, -4, -3, -2, -1, 1, 2, 3, 4), (0, -1, 1)  # of the best zero point, with the factors of the same place
MOST = max(2 * COARSE, *(len(f) * len(s) for f, s in zip(FACTORS, SHIFTS, strict=True)))  # candidates at once
CHUNK = 1 << 22  # weights times candidates in memory at a time


def hessian_grid(weight: Tensor, U: Tensor, format: NumberFormat, dtype: torch.dtype, columns: ColumnKernel) -> Grid:
    """The grid of each row of one group: weight (out, columns), U (columns, columns) of these columns; returns a
    Grid of (out, 1).

    A scale may be negative if the lowest code has no positive counterpart, as for integers without zero points. Then
    the grid fits rows whose largest weight is positive as well as rows whose largest weight is negative.
    """
    blocks = max(1, CHUNK // (MOST * weight.shape[1] * format.row_block))
    rows = blocks * format.row_block
    return Grid.cat([_search(part, U, format, dtype, columns) for part in torch.split(weight, rows)], 0)


def _search(weight: Tensor, U: Tensor, format: NumberFormat, dtype: torch.dtype, columns: ColumnKernel) -> Grid:
    low, high = range_of(weight, format)
    signs = (1.0,) if format.mirrored else (1.0, -1.0)
    coarse = torch.tensor([[1 - STEP * k, sign] for sign in signs for k in range(COARSE)], dtype=weight.dtype)
    candidates = coarse.to(weight.device)[:, :, None].expand(-1, -1, len(weight))
    best, _ = _best(weight, U, candidates[:, 0], candidates[:, 1], low, high, format, dtype, columns)
    shrinks = torch.stack([best[0] + step for step in FINE])
    _, grid = _best(weight, U, shrinks, best[1].expand_as(shrinks), low, high, format, dtype, columns)
    return _with_zero_points(weight, U, grid, format, dtype, columns) if format.zero_points == "whole" else grid


def _with_zero_points(
    weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat, dtype: torch.dtype, columns: ColumnKernel
) -> Grid:
    """The grid (out, 1) with the least loss among scales and zero points near those of a grid (out, 1)."""
    assert isinstance(format, IntFormat)
    for factors, shifts in zip(FACTORS, SHIFTS, strict=True):
        pairs = torch.cartesian_prod(*(torch.tensor(part, dtype=weight.dtype) for part in (factors, shifts)))
        factor, shift = pairs.to(weight.device).T[..., None]
        scale, zero = grid.scale[:, 0], grid.zeros[:, 0]
        moved = torch.where(factor == 1, scale, stored_scale(scale * factor, dtype))
        tried = Grid(moved, (zero + shift).clamp(format.lowest, format.highest))
        chosen = columns.loss(weight, U, tried, format).argmin(0, keepdim=True)
        grid = Grid(*(part.gather(0, chosen)[0][:, None] for part in (tried.scale, tried.zeros)))
    return grid


def _best(
    weight: Tensor,
    U: Tensor,
    shrinks: Tensor,
    signs: Tensor,
    low: Tensor,
    high: Tensor,
    format: NumberFormat,
    dtype: torch.dtype,
    columns: ColumnKernel,
) -> tuple[tuple[Tensor, Tensor], Grid]:
    """The best candidate of each row, out of (candidates, out): its shrink and sign (out,), and its grid (out, 1)."""
    grid = format.span(shrinks * low, shrinks * high, dtype)
    grid = Grid(grid.scale * signs, grid.zero)
    loss = over_row_blocks(columns.loss(weight, U, grid, format).T, format, torch.sum).T
    chosen = loss.argmin(0, keepdim=True)
    shrink, sign, scale = (part.gather(0, chosen)[0] for part in (shrinks, signs, grid.scale))
    zero = None if grid.zero is None else grid.zero.gather(0, chosen)[0][:, None]
    return (shrink, sign), Grid(scale[:, None], zero)
