"""Linears that multiply with packed 4-bit weights, on the kernels that come with torch.

The kernels read codes u in 0..15 and a pair (s, z) for each row and group of input columns. They multiply with
(u - 8) s + z (https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cpu/int4mm_kernel.cpp and
native/cuda/int4mm.cu). The integers of epmq, (q - zero) scale with q in -8..7, are u = q + 8, s = scale and
z = -zero scale. Integers of 2 and 3 bits are stored in 4 bits. A wider group, or a whole row, becomes several groups
with the same pair.

Inputs and pairs are rounded to bfloat16. The CPU kernel also takes float32, but is not vectorized there: it is 13 to 60
times slower than a dense matrix, so use dense weights if results must be exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.int import IntFormat

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = (256, 128, 64, 32)
"""The group sizes that the kernels take."""
ROWS = 16  # the CPU kernel takes multiples of 16 outputs, the CUDA kernel of 8
TILES = (8, 4, 2)  # tiles of 16 columns that the CUDA kernel reads at once
CAPABILITY = (8, 0)


def obstacle(format: NumberFormat, shape: torch.Size, device: torch.device) -> str | None:
    """Why the kernel does not support a weight of this shape and format; None if it does."""
    rows, shared = shape[0], group_columns(format, shape[1])
    if not isinstance(format, IntFormat):
        return f"its format is {format.name}, the kernel takes integers"
    if format.bits > 4:
        return f"it has {format.bits} bits, the kernel takes at most 4"
    if kernel_group(shared) is None:
        return f"{shared} input columns share a scale, the kernel takes multiples of {GROUPS[-1]}"
    if rows % ROWS:
        return f"it has {rows} outputs, the kernel takes multiples of {ROWS}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{device} is older than compute capability 8.0, which the kernel needs"
    return None


def kernel_group(shared: int) -> int | None:
    """The largest group size of the kernels that divides a group of this many columns; None if none does."""
    return next((size for size in GROUPS if shared % size == 0), None)


class Int4Linear(nn.Module):
    """A linear whose weight stays packed in 4 bits while it multiplies. It stays on the device of the weight.

    `weight` (out, in): `obstacle` must be None for it. `bias` (out,). Inputs have any floating type; outputs have the
    same.
    """

    weight = None  # T5's feed-forward converts its input to the type of the weight if there is one

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        grid, shared = weight.grid, group_columns(weight.format, self.in_features)
        self.group = kernel_group(shared) or 0
        pairs = torch.stack([grid.scale, -grid.zeros * grid.scale], 2)
        pairs = pairs.repeat_interleave(shared // self.group, 1).transpose(0, 1)
        unsigned = weight.codes + 8
        self.register_buffer("packed", for_cuda(unsigned) if unsigned.is_cuda else for_cpu(unsigned))
        self.register_buffer("pairs", pairs.to(torch.bfloat16, memory_format=torch.contiguous_format))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        packed, pairs = self.get_buffer("packed"), self.get_buffer("pairs").bfloat16()  # model.to() may have changed it
        rows = x.reshape(-1, self.in_features).bfloat16().contiguous()
        multiply = torch.ops.aten._weight_int4pack_mm if packed.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        output: Tensor = multiply(rows, packed, self.group, pairs).to(x.dtype)
        if self.bias is not None:
            output = output + self.bias
        return output.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The sizes that print shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}"


def for_cpu(unsigned: Tensor) -> Tensor:
    """Codes 0..15 (out, in) in the order of the CPU kernel: uint8 (out, in / 2)."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.int(), 1)  # the 1 has no effect
    return packed


def for_cuda(unsigned: Tensor) -> Tensor:
    """Codes 0..15 (out, in) in the order of the CUDA kernel: int32 (out / 8, in / (16 tiles), 32, tiles / 2)."""
    tiles = next(count for count in TILES if unsigned.shape[1] % (16 * count) == 0)
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs_of(unsigned), tiles)
    return packed


def pairs_of(unsigned: Tensor) -> Tensor:
    """Two codes 0..15 per byte, the even column in the upper half: uint8 (out, in / 2)."""
    narrow = unsigned.to(torch.uint8)
    return narrow[:, ::2] << 4 | narrow[:, 1::2]
