"""Linears whose rows are the same to the last bit, whatever other rows are in the call.

On CPUs products of a few rows are made by other kernels than those of many: MKL sums less than four rows, or what is
left of them for a thread, in another order. Rows of zeros fill such calls up. Attention, norms, convolutions and
activations go sample by sample, or row by row, already. (Measured with one and two threads, torch 2.14, AVX-512; what a
GPU does depends on the shape in ways of its own.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROWS = 64  # at least; from 12 on nothing changes with two threads


class _Steady(nn.Linear):
    """A linear that is never called with less than `ROWS` rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Those of the real rows."""
        rows = input.reshape(-1, input.shape[-1])
        if len(rows) >= ROWS:
            return super().forward(input)
        filled = torch.cat([rows, rows.new_zeros(ROWS - len(rows), rows.shape[1])])
        return super().forward(filled)[: len(rows)].reshape(*input.shape[:-1], -1)


@contextmanager
def batch_invariant(model: nn.Module) -> Iterator[None]:
    """Inside, the rows that the model's linears give do not depend on how many samples are in a batch."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for linear in linears:
        linear.__class__ = _Steady
    try:
        yield
    finally:
        for linear in linears:
            linear.__class__ = nn.Linear
