"""Fits GPTQ's grids to GPTQ's final loss instead of the squared error of the weights.

With U the upper factor of H^-1, quantizing the columns of a group one after the other costs sum_i ((w_i - q_i) /
U_ii)^2, where w_i includes the errors of the columns before it. This sum is computed for all candidate scales at once,
first over the whole range and then near the best.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epmq_cli.quantize.formats.format import Grid, NumberFormat, range_of
from epmq_cli.quantize.kernels.select import ColumnKernel

if TYPE_CHECKING:
    from torch import Tensor

COARSE = 16  # candidates: the full range times 1.00, 0.95, ... 0.25
STEP = 0.05
FINE = (-0.0225, -0.015, -0.0075, 0.0, 0.0075, 0.015, 0.0225, 0.03)  # added to the best coarse one
CHUNK = 1 << 22  # weights times candidates in memory at a time


def hessian_grid(weight: Tensor, U: Tensor, format: NumberFormat, dtype: torch.dtype, columns: ColumnKernel) -> Grid:
    """The grid of each row of one group: weight (out, columns), U (columns, columns) of these columns; returns a
    Grid of (out, 1).

    A scale may be negative if the lowest code has no positive counterpart, as for integers without zero points. Then
    the grid fits rows whose largest weight is positive as well as rows whose largest weight is negative.
    """
    rows = max(1, CHUNK // (2 * COARSE * weight.shape[1]))
    return Grid.cat([_search(part, U, format, dtype, columns) for part in torch.split(weight, rows)], 0)


def _search(weight: Tensor, U: Tensor, format: NumberFormat, dtype: torch.dtype, columns: ColumnKernel) -> Grid:
    low, high = range_of(weight, format)
    signs = (1.0,) if format.mirrored else (1.0, -1.0)
    coarse = torch.tensor([[1 - STEP * k, sign] for sign in signs for k in range(COARSE)], dtype=weight.dtype)
    candidates = coarse.to(weight.device)[:, :, None].expand(-1, -1, len(weight))
    best, _ = _best(weight, U, candidates[:, 0], candidates[:, 1], low, high, format, dtype, columns)
    shrinks = torch.stack([best[0] + step for step in FINE])
    _, grid = _best(weight, U, shrinks, best[1].expand_as(shrinks), low, high, format, dtype, columns)
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
    chosen = columns.loss(weight, U, grid, format).argmin(0, keepdim=True)
    shrink, sign, scale = (part.gather(0, chosen)[0] for part in (shrinks, signs, grid.scale))
    zero = None if grid.zero is None else grid.zero.gather(0, chosen)[0][:, None]
    return (shrink, sign), Grid(scale[:, None], zero)
