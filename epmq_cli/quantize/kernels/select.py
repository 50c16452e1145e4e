"""GPTQ's loop over the columns of one group, in plain torch; and which of its implementations serves a weight.

All do the same float operations in the same order, and so give the same integers to the last bit:
this one (any type, any device), columns_numba (float32 on the CPU), columns_triton (float32 on a GPU).
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from epmq_cli.errors import first_line
from epmq_cli.quantize.formats.int import Grid, GridSpec, quantize

log = logging.getLogger("epmq")


class ColumnKernel(Protocol):
    """An implementation."""

    def walk(self, weight: Tensor, U: Tensor, grid: Grid, spec: GridSpec) -> tuple[Tensor, Tensor]:
        """Quantizes columns one after the other, each with the errors of those before it: the integers and the errors,
        both (out, columns).

        `weight` (out, columns), which is left as it is; `U` (columns, columns) of these columns, upper triangular;
        `grid` (out, 1).
        """

    def loss(self, weight: Tensor, U: Tensor, grid: Grid, spec: GridSpec) -> Tensor:
        """What that loop ends with, the sum of the squared errors, for each of several grids; grids and result
        (candidates, out)."""


def kernel_for(weight: Tensor) -> ColumnKernel:
    """The implementation for a weight."""
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
        TritonKernel().walk(one, one, Grid(one, one), GridSpec(4, 1, True, "minmax"))
    except Exception as error:  # of Triton, of the compiler that it calls, or of the driver
        log.warning("Triton builds no kernels here, which makes GPTQ slower (%s)", first_line(error))
        return False
    return True


class TorchKernel:
    """Column by column, all rows and candidates at a time."""

    def walk(self, weight: Tensor, U: Tensor, grid: Grid, spec: GridSpec) -> tuple[Tensor, Tensor]:
        """See Columns."""
        W, values, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
        scale, zero = grid.scale[:, 0], grid.zero[:, 0]
        for i in range(weight.shape[1]):
            q = quantize(W[:, i], scale, zero, spec)
            error = (W[:, i] - (q - zero) * scale) / U[i, i]
            W[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
            values[:, i], errors[:, i] = q, error
        return values, errors

    def loss(self, weight: Tensor, U: Tensor, grid: Grid, spec: GridSpec) -> Tensor:
        """See Columns; columns come first in memory here."""
        W = weight.T[:, None].repeat(1, len(grid.scale), 1)
        total = torch.zeros_like(grid.scale)
        for i in range(weight.shape[1]):
            rounded = (quantize(W[i], grid.scale, grid.zero, spec) - grid.zero) * grid.scale
            error = (W[i] - rounded) / U[i, i]
            W[i + 1 :] -= U[i, i + 1 :, None, None] * error
            total += error * error
        return total
