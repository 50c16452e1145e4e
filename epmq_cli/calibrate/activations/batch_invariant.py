"""Linears whose output rows are bit-identical, regardless of the other rows in the call.

On CPUs, matrix products with few rows use other kernels: MKL sums fewer than four rows, or a thread's remainder of
rows, in another order. Such calls are padded with rows of zeros. Attention, norms, convolutions and activations already
work sample by sample or row by row. (Measured with one and two threads, torch 2.14, AVX-512. On GPUs, results may still
depend on the shape.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 64  # the minimum; with two threads, 12 suffice


class _PaddedLinear(nn.Linear):
    """A linear that pads its input to at least `ROWS` rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the outputs of the real rows."""
        rows = input.reshape(-1, input.shape[-1])
        if len(rows) >= ROWS:
            return super().forward(input)
        filled = torch.cat([rows, rows.new_zeros(ROWS - len(rows), rows.shape[1])])
        return super().forward(filled)[: len(rows)].reshape(*input.shape[:-1], -1)


@contextmanager
def batch_invariant(model: nn.Module) -> Iterator[None]:
    """Inside the context, the outputs of the model's linears do not depend on the batch size."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for linear in linears:
        linear.__class__ = _PaddedLinear
    try:
        yield
    finally:
        for linear in linears:
            linear.__class__ = nn.Linear
