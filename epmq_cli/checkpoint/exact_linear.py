"""Linears whose weights stay packed in memory, and that compute what the dequantized weight computes.

At each call the weight is dequantized, multiplied with, and freed. So outputs equal those of a dense linear to the last
bit, on every device and for every number format, where the int4 kernels round inputs to bfloat16. A call takes the time
to dequantize the weight on top of the product.

Integers of at most 4 bits take half a byte, all other codes a byte. Buffers are bytes, so that `model.to(dtype)` does
not round scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear

from epmq_cli.quantize.formats.format import Grid, QuantizedWeight
from epmq_cli.quantize.formats.int import IntFormat

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 1 << 18
"""The weights that are dequantized together, so that a processor's cache holds them."""


class ExactLinear(nn.Module):
    """A linear whose weight stays packed. It stays on the device of the weight.

    `weight` (out, in), without real zero points. `bias` (out,). Outputs have the type of the inputs.
    """

    weight = None  # T5's feed-forward converts its input to the type of the weight if there is one

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format, self.dtype = weight.format, weight.dtype
        scale = weight.grid.scale
        stored = scale.to(weight.dtype)
        self.scale_dtype = weight.dtype if torch.equal(stored.to(scale.dtype), scale) else scale.dtype
        zero = None if weight.grid.zero is None else weight.grid.zero.to(torch.int8)
        halves = isinstance(self.format, IntFormat) and self.format.bits <= 4 and self.in_features % 2 == 0
        self.register_buffer("packed", in_halves(weight.codes) if halves else as_bytes(weight.codes))
        self.register_buffer("scale", as_bytes(scale.to(self.scale_dtype)))
        self.register_buffer("zero", zero)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.dense(x.dtype), self.bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in), as readers of the checkpoint have it, in this type."""
        packed = self.get_buffer("packed")
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=packed.device)
        step = max(1, AT_ONCE // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            weight[rows] = self._rows(rows).dequantize()
        return weight

    def _rows(self, rows: slice) -> QuantizedWeight:
        """Some rows of the quantized weight."""
        packed, scale = self.get_buffer("packed")[rows], self.get_buffer("scale")[rows].view(self.scale_dtype).float()
        zero = None if self.format.zero_points == "none" else self.get_buffer("zero")[rows].float()
        whole = packed.shape[1] == self.in_features
        codes = packed.view(self.format.storage) if whole else from_halves(packed)
        return QuantizedWeight(codes, Grid(scale, zero), self.format, self.dtype)

    def extra_repr(self) -> str:
        """The sizes that print shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.name}"


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a matrix: uint8 (rows, bytes)."""
    return tensor.contiguous().view(torch.uint8)


def in_halves(codes: Tensor) -> Tensor:
    """Two codes -8..7 per byte: uint8 (out, in / 2). The lower half of byte i holds column i, its upper half column
    i + in / 2."""
    low, high = (codes.view(torch.uint8) & 15).chunk(2, 1)
    return low | high << 4


def from_halves(packed: Tensor) -> Tensor:
    """The codes int8 (out, in) that `in_halves` packed."""
    signed = packed.view(torch.int8)
    return torch.cat([signed << 4 >> 4, signed >> 4], 1)  # shifts to the right repeat the sign
