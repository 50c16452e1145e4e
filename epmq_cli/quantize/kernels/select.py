"""GPTQ's loop over the columns of one group, in plain torch; and which of its implementations serves a weight.

All do the same float operations in the same order, and so give the same integers to the last bit:
this one (any format, type and device), columns_numba (integers, float32 on the CPU), columns_triton (integers, float32
on a GPU).
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from epmq_cli.errors import first_line
from epmq_cli.quantize.formats.format import Grid, NumberFormat
from epmq_cli.quantize.formats.int import IntFormat

log = logging.getLogger("epmq")


class ColumnKernel(Protocol):
    """An implementation."""

    def walk(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> tuple[Tensor, Tensor]:
        """Quantizes columns one after the other, each with the errors of those before it: the codes and the errors,
        both (out, columns).

        `weight` (out, columns), which is left as it is; `U` (columns, columns) of these columns, upper triangular;
        `grid` (out, 1).
        """

    def loss(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> Tensor:
        """What that loop ends with, the sum of the squared errors, for each of several grids; grids and result
        (candidates, out)."""


def kernel_for(weight: Tensor, format: NumberFormat) -> ColumnKernel:
    """The implementation for a weight and its format."""
    if not isinstance(format, IntFormat) or format.zero_points == "real":
        return TorchKernel()
    if weight.dtype == torch.float32 and weight.device.type == "cpu":
        from epmq_cli.quantize.kernels.numba import NumbaKernel

        return NumbaKernel()
    if weight.dtype == torch.float32 and weight.device.type == "cuda" and triton_works(weight.device):
        from epmq_cli.quantize.kernels.triton import TritonKernel

        found: ColumnKernel = TritonKernel()
        return found
    return TorchKernel()


@cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton is there and can build kernels for the device, which takes a C compiler and Python's headers."""
    if find_spec("triton") is None:
        return False
    try:
        from epmq_cli.quantize.kernels.triton import TritonKernel

        one = torch.ones(1, 1, device=device)
        TritonKernel().walk(one, one, Grid(one, one), IntFormat(4, 1, "none"))
    except Exception as error:  # of Triton, of the compiler that it calls, or of the driver
        log.warning("Triton builds no kernels here, which makes GPTQ slower (%s)", first_line(error))
        return False
    return True


class TorchKernel:
    """Column by column, all rows and candidates at a time."""

    def walk(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> tuple[Tensor, Tensor]:
        """See Columns."""
        W, errors = weight.clone(), torch.empty_like(weight)
        codes = torch.empty_like(weight, dtype=format.storage)
        for i in range(weight.shape[1]):
            q = format.encode(W[:, i : i + 1], grid)
            error = (W[:, i : i + 1] - format.decode(q, grid)) / U[i, i]
            W[:, i + 1 :] -= error * U[i, i + 1 :]
            codes[:, i : i + 1], errors[:, i : i + 1] = q, error
        return codes, errors

    def loss(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> Tensor:
        """See Columns; columns come first in memory here."""
        W = weight.T[:, None].repeat(1, len(grid.scale), 1)
        total = torch.zeros_like(grid.scale)
        for i in range(weight.shape[1]):
            error = (W[i] - format.decode(format.encode(W[i], grid), grid)) / U[i, i]
            W[i + 1 :] -= U[i, i + 1 :, None, None] * error
            total += error * error
        return total
