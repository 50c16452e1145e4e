"""Linears whose products are as fast as torch can make them in float32, also those of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from epmq_cli.runtime.products import fast_products

if TYPE_CHECKING:
    from torch import Tensor


class _Affine(torch.autograd.Function):
    """x W' + b; the gradients are computed later, when no context of the forward pass is left."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        rows, (of_input, of_weight, of_bias) = gradient.flatten(0, -2), ctx.needs_input_grad
        with fast_products():
            return (
                gradient @ weight if of_input else None,
                rows.T @ input.flatten(0, -2) if of_weight else None,
                rows.sum(0) if of_bias else None,
            )


class FastLinear(nn.Linear):
    """A linear that differs from torch's in its speed and in rounding errors of float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the outputs (..., out)."""
        with fast_products():
            if not torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type):
                return super().forward(input)
            outputs: Tensor = _Affine.apply(input, self.weight, self.bias)
            return outputs


@contextmanager
def fast_linears(model: nn.Module, kind: type[FastLinear] = FastLinear) -> Iterator[None]:
    """Inside the context, the model's linears are of this kind."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for linear in linears:
        linear.__class__ = kind
    try:
        yield
    finally:
        for linear in linears:
            linear.__class__ = nn.Linear
