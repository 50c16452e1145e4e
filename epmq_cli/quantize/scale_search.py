"""Grids for GPTQ by the loss that it ends with, instead of the squared error of the weights.

With U the upper factor of H^-1, quantizing the columns of a group one after the other costs sum_i ((w_i - q_i) /
U_ii)^2, where w_i holds the errors of the columns before it. That very sum is tried for every candidate scale, all of
them at once, first over the whole range and then near the best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epmq_cli.quantize.formats.int import Grid, GridSpec, grid_of_range, range_of
from epmq_cli.quantize.kernels.select import ColumnKernel

COARSE = 16  # candidates: the full range times 1.00, 0.95, ... 0.25
STEP = 0.05
FINE = (-0.0225, -0.015, -0.0075, 0.0, 0.0075, 0.015, 0.0225, 0.03)  # added to the best of them
CHUNK = 1 << 22  # weights tried at a time


def hessian_grid(weight: Tensor, U: Tensor, spec: GridSpec, dtype: torch.dtype, columns: ColumnKernel) -> Grid:
    """The grid of each row of one group: weight (out, columns), U (columns, columns) of these columns; Grid of (out,
    1).

    On symmetric grids a scale may be negative: the integers reach one further down than up, which so fits rows whose
    largest weight is positive as well as those whose largest is negative.
    """
    rows = max(1, CHUNK // (2 * COARSE * weight.shape[1]))
    parts = [_search(part, U, spec, dtype, columns) for part in torch.split(weight, rows)]
    return Grid(torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts]))


def _search(weight: Tensor, U: Tensor, spec: GridSpec, dtype: torch.dtype, columns: ColumnKernel) -> Grid:
    low, high = range_of(weight, spec)
    signs = (1.0, -1.0) if spec.symmetric else (1.0,)
    coarse = torch.tensor([[1 - STEP * k, sign] for sign in signs for k in range(COARSE)], dtype=weight.dtype)
    candidates = coarse.to(weight.device)[:, :, None].expand(-1, -1, len(weight))
    best, _ = _best(weight, U, candidates[:, 0], candidates[:, 1], low, high, spec, dtype, columns)
    shrinks = torch.stack([best[0] + step for step in FINE])
    _, grid = _best(weight, U, shrinks, best[1].expand_as(shrinks), low, high, spec, dtype, columns)
    return grid


def _best(
    weight: Tensor,
    U: Tensor,
    shrinks: Tensor,
    signs: Tensor,
    low: Tensor,
    high: Tensor,
    spec: GridSpec,
    dtype: torch.dtype,
    columns: ColumnKernel,
) -> tuple[tuple[Tensor, Tensor], Grid]:
    """Of candidates (candidates, out) the best of each row: its shrink and sign (out,), and its grid (out, 1)."""
    grid = grid_of_range(shrinks * low, shrinks * high, spec, dtype)
    scale = grid.scale * signs
    chosen = columns.loss(weight, U, Grid(scale, grid.zero), spec).argmin(0, keepdim=True)
    picked = [part.gather(0, chosen)[0] for part in (shrinks, signs, scale, grid.zero)]
    return (picked[0], picked[1]), Grid(picked[2][:, None], picked[3][:, None])
