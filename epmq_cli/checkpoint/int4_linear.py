"""Linears that multiply with packed 4-bit weights, on the kernels that come with torch.

The kernels read u in 0..15 with a pair (s, z) for each row and group of input columns, and calculate with (u - 8) s + z
(https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cpu/int4mm_kernel.cpp and native/cuda/int4mm.cu). A
grid of epmq's, (q - zero) scale with q in -8..7, is that with u = q + 8, s = scale and z = -zero scale. Fewer bits are
integers of 4 bits too, and a wider group, or a whole row, is several groups of the same pair.

Inputs and pairs are rounded to bfloat16. The CPU's kernel takes float32 as well, but is not vectorised there: 13 to 60
times slower than a dense matrix, so that whoever needs the exact weights is better off with those.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.int import IntFormat

GROUPS = (256, 128, 64, 32)
"""The input columns that may share a pair."""
ROWS = 16  # the CPU's kernel takes multiples of it, CUDA's of 8
TILES = (8, 4, 2)  # of 16 columns each, that CUDA's kernel reads at once
CAPABILITY = (8, 0)


def obstacle(format: NumberFormat, shape: torch.Size, device: torch.device) -> str | None:
    """Why a weight of this shape on such a grid cannot go to the kernel; None where it can."""
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
    """The largest group of the kernel that divides one of so many columns; None where none does."""
    return next((size for size in GROUPS if shared % size == 0), None)


class Int4Linear(nn.Module):
    """A linear whose weight stays packed, four bits each, also while it is used. It stays on the device it is made on.

    `weight` (out, in) without an `obstacle`, `bias` (out,). Inputs of any floating type; outputs have the same.
    """

    weight = None  # T5's feed-forward looks whether there is one, to convert its input to that type

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
        packed, pairs = self.get_buffer("packed"), self.get_buffer("pairs").bfloat16()  # whatever type the model gets
        rows = x.reshape(-1, self.in_features).bfloat16().contiguous()
        multiply = torch.ops.aten._weight_int4pack_mm if packed.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        found: Tensor = multiply(rows, packed, self.group, pairs).to(x.dtype)
        if self.bias is not None:
            found = found + self.bias
        return found.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}"


def for_cpu(unsigned: Tensor) -> Tensor:
    """The CPU kernel's order of integers 0..15 (out, in): uint8 (out, in / 2)."""
    found: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.int(), 1)  # the 1 has no effect
    return found


def for_cuda(unsigned: Tensor) -> Tensor:
    """The CUDA kernel's order of integers 0..15 (out, in): int32 (out / 8, in / (16 tiles), 32, tiles / 2)."""
    tiles = next(count for count in TILES if unsigned.shape[1] % (16 * count) == 0)
    found: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs_of(unsigned), tiles)
    return found


def pairs_of(unsigned: Tensor) -> Tensor:
    """Two integers 0..15 a byte, the even column in the upper half: uint8 (out, in / 2)."""
    narrow = unsigned.to(torch.uint8)
    return narrow[:, ::2] << 4 | narrow[:, 1::2]
