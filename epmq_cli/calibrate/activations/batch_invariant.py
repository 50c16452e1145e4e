"""Linears whose output rows are bit-identical, regardless of the other rows in the call.

On CPUs, matrix products with few rows use other kernels: MKL sums fewer than four rows, or a thread's remainder of
rows, in another order. Such calls are padded with rows of zeros. Attention, norms, convolutions and activations already
work sample by sample or row by row. (Measured with one and two threads, torch 2.14, AVX-512. On GPUs, results may still
depend on the shape.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from epmq_cli.models.fast_linears import FastLinear, fast_linears
from epmq_cli.models.routed_experts import routers, shared_factors

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 64  # the minimum; with two threads, 12 suffice


class _PaddedLinear(FastLinear):
    """A fast linear that pads its input to at least `ROWS` rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the outputs of the real rows."""
        rows = input.reshape(-1, input.shape[-1])
        if len(rows) >= ROWS:
            return super().forward(input)
        filled = torch.cat([rows, rows.new_zeros(ROWS - len(rows), rows.shape[1])])
        return super().forward(filled)[: len(rows)].reshape(*input.shape[:-1], self.out_features)


class _SharedFactor(nn.Linear):
    """The factor of a shared expert. Products of matrix and vector, and a sigmoid of as many numbers as there are
    tokens, depend on their number, so the factor is computed token by token and repeated over the channels."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the factor (tokens, 1) before its sigmoid as (tokens, width)."""
        return (input * self.weight[0]).sum(-1, keepdim=True).expand(input.shape).contiguous()


def _padded(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a router that pads its input (tokens, width) likewise."""

    def forward(self: nn.Module, rows: Tensor) -> Any:
        outputs = cls.forward(self, torch.cat([rows, rows.new_zeros(max(ROWS - len(rows), 0), rows.shape[1])]))
        return tuple(output[: len(rows)] for output in outputs)

    return type(cls.__name__, (cls,), {"forward": forward})


@contextmanager
def batch_invariant(model: nn.Module) -> Iterator[None]:
    """Inside the context, the outputs of the model's linears and routers do not depend on the batch size."""
    routing = [(module, type(module)) for _, module in routers(model)]
    for router, cls in routing:
        router.__class__ = _padded(cls)
    try:
        with fast_linears(model, _PaddedLinear):
            for factor in shared_factors(model):
                factor.__class__ = _SharedFactor
            yield
    finally:
        for router, cls in routing:
            router.__class__ = cls
