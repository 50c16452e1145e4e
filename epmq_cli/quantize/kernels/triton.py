"""GPTQ's loop over columns for the GPU: a tile of rows walks the columns of a group on the chip.

TRITON_INTERPRET=1 runs the kernels on the CPU. No two operations are fused, divisions are exact, and rounding is half
to even, so that the integers are those of the other implementations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty_like, zeros_like

from epmq_cli.quantize.formats.int import Grid, GridSpec
from epmq_cli.quantize.kernels.select import TorchKernel

SEARCHED = 4096  # weights of a tile of one of many candidates, all of them in registers
WALKED = 1024  # of a tile of a weight, of which a GPU takes few at a time, with its integers and errors
WIDEST = 512  # columns of a tile; wider groups are searched by torch


@triton.jit
def _rounded(x):
    """The nearest integer, half to even: adding 1.5 x 2^23 leaves a float32 no bits for a fraction."""
    x = tl.minimum(tl.maximum(x, -1048576.0), 1048576.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _step(W, U, i, s, z, low, high, cols, width):
    """One column: its integers and errors (rows,), and the tile with the errors handed on to later columns."""
    w = tl.sum(tl.where(cols[None, :] == i, W, 0.0), 1)
    q = tl.minimum(tl.maximum(_rounded(tl.div_rn(w, s)) + z, low), high)
    error = tl.div_rn(w - (q - z) * s, tl.load(U + i * width + i))
    later = (cols > i) & (cols < width)
    u = tl.load(U + i * width + cols, mask=later, other=0.0)
    return q, error, W - error[:, None] * u[None, :]


@triton.jit
def _walk(W, U, scale, zero, values, errors, rows, width, low, high, R: tl.constexpr, C: tl.constexpr):
    row, cols = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, C)
    there = (row < rows)[:, None] & (cols < width)[None, :]
    place = row[:, None] * width + cols[None, :]
    tile = tl.load(W + place, mask=there, other=0.0)
    s, z = tl.load(scale + row, mask=row < rows, other=1.0), tl.load(zero + row, mask=row < rows, other=0.0)
    found, made = tl.zeros_like(tile), tl.zeros_like(tile)
    for i in range(width):
        q, error, tile = _step(tile, U, i, s, z, low, high, cols, width)
        found = tl.where(cols[None, :] == i, q[:, None], found)
        made = tl.where(cols[None, :] == i, error[:, None], made)
    tl.store(values + place, found, mask=there)
    tl.store(errors + place, made, mask=there)


@triton.jit
def _loss(W, U, scale, zero, total, rows, width, low, high, R: tl.constexpr, C: tl.constexpr):
    row, cols = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, C)
    there = (row < rows)[:, None] & (cols < width)[None, :]
    tile = tl.load(W + row[:, None] * width + cols[None, :], mask=there, other=0.0)
    place = tl.program_id(1) * rows + row
    s, z = tl.load(scale + place, mask=row < rows, other=1.0), tl.load(zero + place, mask=row < rows, other=0.0)
    sums = tl.zeros_like(s)
    for i in range(width):
        _, error, tile = _step(tile, U, i, s, z, low, high, cols, width)
        sums += error * error
    tl.store(total + place, sums, mask=row < rows)


class TritonKernel:
    """See columns.py."""

    def walk(self, weight: Tensor, U: Tensor, grid: Grid, spec: GridSpec) -> tuple[Tensor, Tensor]:
        """See columns.py."""
        rows, width = weight.shape
        if width > WIDEST:
            return TorchKernel().walk(weight, U, grid, spec)
        values, errors = empty_like(weight).contiguous(), empty_like(weight).contiguous()
        R, C = _tile(width, WALKED)
        inputs = [tensor.contiguous() for tensor in (weight, U, grid.scale[:, 0], grid.zero[:, 0])]
        _walk[(triton.cdiv(rows, R),)](
            *inputs, values, errors, rows, width, spec.lowest, spec.highest, R=R, C=C, enable_fp_fusion=False
        )
        return values, errors

    def loss(self, weight: Tensor, U: Tensor, grid: Grid, spec: GridSpec) -> Tensor:
        """See columns.py."""
        rows, width = weight.shape
        if width > WIDEST:
            return TorchKernel().loss(weight, U, grid, spec)
        total = zeros_like(grid.scale).contiguous()
        R, C = _tile(width, SEARCHED)
        inputs = [tensor.contiguous() for tensor in (weight, U, grid.scale, grid.zero)]
        _loss[(triton.cdiv(rows, R), len(total))](
            *inputs, total, rows, width, spec.lowest, spec.highest, R=R, C=C, enable_fp_fusion=False
        )
        return total


def _tile(width: int, weights: int) -> tuple[int, int]:
    """Rows and columns of a tile of so many weights, powers of two."""
    columns = max(16, triton.next_power_of_2(width))
    return max(1, weights // columns), columns
