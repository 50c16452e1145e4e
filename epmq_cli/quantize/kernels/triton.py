"""GPTQ's loop over columns on a GPU: each program keeps a tile of rows in registers and loops over the columns.

TRITON_INTERPRET=1 runs the kernels on the CPU. No operations are fused, divisions are exact, and rounding is half to
even, so codes equal those of the other implementations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty_like, zeros_like

from epmq_cli.quantize.formats.format import Grid, NumberFormat
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.kernels.select import TorchKernel

SEARCHED = 4096  # weights of a tile in the search, one of many candidates
WALKED = 1024  # weights of a tile that is quantized, which also holds its codes and errors
WIDEST = 512  # columns of a tile; wider groups use the torch kernel


@triton.jit
def _rounded(x):
    """The nearest integer, half to even: adding 1.5 x 2^23 leaves no bits for a fraction in float32."""
    x = tl.minimum(tl.maximum(x, -1048576.0), 1048576.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _step(W, U, i, s, z, low, high, cols, width):
    """One column: its codes and errors (rows,), and the tile after its errors are spread over later columns."""
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
    codes, spread = tl.zeros_like(tile), tl.zeros_like(tile)
    for i in range(width):
        q, error, tile = _step(tile, U, i, s, z, low, high, cols, width)
        codes = tl.where(cols[None, :] == i, q[:, None], codes)
        spread = tl.where(cols[None, :] == i, error[:, None], spread)
    tl.store(values + place, codes, mask=there)
    tl.store(errors + place, spread, mask=there)


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
    """See select.py."""

    def quantize(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> tuple[Tensor, Tensor]:
        """See select.py."""
        assert isinstance(format, IntFormat)
        rows, width = weight.shape
        if width > WIDEST:
            return TorchKernel().quantize(weight, U, grid, format)
        values, errors = empty_like(weight).contiguous(), empty_like(weight).contiguous()
        R, C = _tile(width, WALKED)
        inputs = [tensor.contiguous() for tensor in (weight, U, grid.scale[:, 0], grid.zeros[:, 0])]
        _walk[(triton.cdiv(rows, R),)](
            *inputs, values, errors, rows, width, format.lowest, format.highest, R=R, C=C, enable_fp_fusion=False
        )
        return values.to(format.storage), errors

    def loss(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> Tensor:
        """See select.py."""
        assert isinstance(format, IntFormat)
        rows, width = weight.shape
        if width > WIDEST:
            return TorchKernel().loss(weight, U, grid, format)
        total = zeros_like(grid.scale).contiguous()
        R, C = _tile(width, SEARCHED)
        inputs = [tensor.contiguous() for tensor in (weight, U, grid.scale, grid.zeros)]
        _loss[(triton.cdiv(rows, R), len(total))](
            *inputs, total, rows, width, format.lowest, format.highest, R=R, C=C, enable_fp_fusion=False
        )
        return total


def _tile(width: int, weights: int) -> tuple[int, int]:
    """Rows and columns of a tile with this many weights, powers of two."""
    columns = max(16, triton.next_power_of_2(width))
    return max(1, weights // columns), columns
