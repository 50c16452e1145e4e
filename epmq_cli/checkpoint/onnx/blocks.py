"""Quantized linears as the operator MatMulNBits of ONNX Runtime
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).

The operator holds unsigned integers u of 2, 4 or 8 bits in blocks of 16, 32, 64, ... neighbouring inputs of a row, the
first in the lowest bits, with a float32 scale and a zero point z of the same width for each block; the weight is
(u - z) scale. Codes and zero points of epmq are shifted by half the range; nothing is rounded again. A group of several
blocks becomes blocks with the same scale. Integers of 3 bits are stored in 4, those of 5 to 7 bits in 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import pad

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.int import IntFormat

if TYPE_CHECKING:
    from torch import Tensor

OPERATOR = "com.microsoft::MatMulNBits"
SMALLEST, LARGEST = 16, 128  # the inputs of a block for which all widths have fast kernels on the CPU
STORED = (2, 4, 8)
LEVELS = {"float32": 1, "int8": 4}
"""The accuracy_level of the operator for each type in which it multiplies."""


def stored_bits(format: NumberFormat) -> int:
    """The width in which the operator stores a format."""
    return next(bits for bits in STORED if bits >= format.bits)


def block_size(columns: int, format: NumberFormat) -> int:
    """The inputs of a block: the largest power of two that divides a group, or fills a row of one group."""
    if columns == group_columns(format, columns):
        return min(LARGEST, max(SMALLEST, 1 << (columns - 1).bit_length()))
    shared = group_columns(format, columns)
    return min(LARGEST, shared & -shared)


def check_blocks(name: str, columns: int, format: NumberFormat) -> None:
    """ConfigError if the operator cannot hold a linear with this many inputs."""
    if not isinstance(format, IntFormat) or format.zero_points == "real":
        raise ConfigError(
            f"MatMulNBits of ONNX Runtime holds integers, got {format.name} in {name}; "
            "use quant.format=int, or export a checkpoint of pack=dense"
        )
    if block_size(columns, format) < SMALLEST:
        raise ConfigError(
            f"MatMulNBits of ONNX Runtime needs groups that are multiples of {SMALLEST} inputs, got "
            f"{format.group_size} in {name}; use group_size=32 or 64"
        )


def packed(unsigned: Tensor, bits: int) -> Tensor:
    """Integers (..., n) in bytes (..., n bits / 8), the first one in the lowest bits."""
    count = 8 // bits
    parts = unsigned.to(torch.uint8).reshape(*unsigned.shape[:-1], -1, count).unbind(-1)
    whole = torch.zeros_like(parts[0])
    for place, part in enumerate(parts):
        whole |= part << place * bits
    return whole


class BlockLinear(nn.Module):
    """A linear that torch.onnx writes as one MatMulNBits. Only its export has values, its forward pass has none.

    `weight` (out, in): `check_blocks` must take it. `bias` (out,). `level`: the accuracy_level.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, level: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.block = stored_bits(weight.format), block_size(self.in_features, weight.format)
        self.level = level
        shift = 1 << (self.bits - 1)
        blocks = -(-self.in_features // self.block)
        unsigned = pad(weight.codes + shift, (0, blocks * self.block - self.in_features))
        self.register_buffer("codes", packed(unsigned.reshape(-1, blocks, self.block), self.bits))
        self.register_buffer("scales", self._per_block(weight.grid.scale.float(), blocks))
        points = None
        if weight.grid.zero is not None:
            points = self._per_block(weight.grid.zero.to(torch.int8) + shift, blocks)
            points = packed(pad(points, (0, -blocks % (8 // self.bits))), self.bits)
        self.register_buffer("points", points)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        codes, scales = self.get_buffer("codes"), self.get_buffer("scales")
        inputs = (x, codes, scales, self._buffers["points"], None, self._buffers["bias"])
        sizes = {"K": self.in_features, "N": self.out_features, "bits": self.bits, "block_size": self.block}
        output: Tensor = torch.onnx.ops.symbolic(
            OPERATOR,
            inputs,
            {**sizes, "accuracy_level": self.level},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return output

    def _per_block(self, groups: Tensor, blocks: int) -> Tensor:
        """Numbers (out, groups) for each block."""
        return groups.repeat_interleave(blocks // groups.shape[1], 1).contiguous()
