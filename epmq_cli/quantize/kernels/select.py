"""GPTQ's loop over the columns of one group in plain torch, and the choice among its implementations.

All implementations do the same float operations in the same order, so that their codes are bit-identical: the one here
(any format, type and device), numba.py (integers, float32 on the CPU) and triton.py (integers, float32 on a GPU).
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch

from epmq_cli.errors import first_line
from epmq_cli.quantize.formats.format import Grid, NumberFormat
from epmq_cli.quantize.formats.int import IntFormat

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("epmq")


class ColumnKernel(Protocol):
    """An implementation of the loop."""

    def quantize(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> tuple[Tensor, Tensor]:
        """Quantizes one column after the other and spreads its error over the rest: the codes and the errors, both
        (out, columns).

        `weight` (out, columns), which is not changed; `U` (columns, columns), upper triangular; `grid` (out, 1).
        """

    def loss(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> Tensor:
        """The sum of the squared errors of that loop for each of several grids; grids and result (candidates, out)."""


def kernel_for(weight: Tensor, format: NumberFormat) -> ColumnKernel:
    """The implementation for a weight and its format."""
    if not isinstance(format, IntFormat) or format.zero_points == "real":
        return TorchKernel()
    if weight.dtype == torch.float32 and weight.device.type == "cpu":
        from epmq_cli.quantize.kernels.numba import NumbaKernel

        return NumbaKernel()
    if weight.dtype == torch.float32 and weight.device.type == "cuda" and triton_works(weight.device):
        from epmq_cli.quantize.kernels.triton import TritonKernel

        kernel: ColumnKernel = TritonKernel()
        return kernel
    return TorchKernel()


def load_kernels(device: torch.device) -> None:
    """Imports and compiles the kernels of a device, which takes up to a second, before they are needed."""
    weight, format = torch.zeros(1, 4, device=device), IntFormat(4, 4, "none")
    kernel, U = kernel_for(weight, format), torch.eye(4, device=device)
    grid = Grid(torch.ones(1, 1, device=device), None)
    kernel.quantize(weight, U, grid, format)
    kernel.loss(weight, U, grid, format)


@cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton can build kernels for the device, which requires a C compiler and Python's headers."""
    if find_spec("triton") is None:
        return False
    try:
        from epmq_cli.quantize.kernels.triton import TritonKernel

        one = torch.ones(1, 1, device=device)
        TritonKernel().quantize(one, one, Grid(one, one), IntFormat(4, 1, "none"))
    except Exception as error:  # from Triton, its compiler or the driver
        log.warning("Triton cannot build kernels here (%s); GPTQ runs slower without them", first_line(error))
        return False
    return True


class TorchKernel:
    """Column by column, all rows and candidates at once."""

    def quantize(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> tuple[Tensor, Tensor]:
        """See ColumnKernel."""
        W, errors = weight.clone(), torch.empty_like(weight)
        codes = torch.empty_like(weight, dtype=format.storage)
        for i in range(weight.shape[1]):
            q = format.encode(W[:, i : i + 1], grid)
            error = (W[:, i : i + 1] - format.decode(q, grid)) / U[i, i]
            W[:, i + 1 :] -= error * U[i, i + 1 :]
            codes[:, i : i + 1], errors[:, i : i + 1] = q, error
        return codes, errors

    def loss(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> Tensor:
        """See ColumnKernel; columns are the first dimension in memory."""
        W = weight.T[:, None].repeat(1, len(grid.scale), 1)
        total = torch.zeros_like(grid.scale)
        for i in range(weight.shape[1]):
            error = (W[i] - format.decode(format.encode(W[i], grid), grid)) / U[i, i]
            W[i + 1 :] -= U[i, i + 1 :, None, None] * error
            total += error * error
        return total
