"""Linears that multiply with packed 4-bit weights, on the kernels that come with torch.

A weight of the checkpoint is q scale with whole q in -8..7, or (q - zero) scale; the kernels take u = q + 8 and give
(u - 8) scale + shift. Fewer bits are integers of 4 bits too, and one scale a row is the same scale for every group. The
kernels calculate in bfloat16: inputs and scales are rounded to that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUPS = (256, 128, 64, 32)
"""The input columns that may share a scale, for torch's kernels."""
MULTIPLE = {"cpu": (16, 32), "cuda": (8, 128)}
"""What rows and columns of a weight must be multiples of."""
TILES = 8  # of 16 columns each, side by side in the packing for CUDA


def obstacle(rows: int, columns: int, bits: int, group_size: int, device: torch.device) -> str | None:
    """Why a weight (rows, columns) cannot go to the kernel, or None where it can; `group_size` as in the checkpoint,
    `columns` for one scale a row."""
    if device.type not in MULTIPLE:
        return f"there is no kernel for {device.type}"
    if bits > 4:
        return f"it has {bits} bits"
    if kernel_group(columns, group_size) is None:
        return f"{group_size} input columns share a scale, the kernel takes multiples of {GROUPS[-1]}"
    out, wide = MULTIPLE[device.type]
    if rows % out or columns % wide:
        return f"it is {rows} x {columns}, the kernel takes multiples of {out} x {wide}"
    return None


def kernel_group(columns: int, group_size: int) -> int | None:
    """The largest group of the kernel that divides the checkpoint's, so that a scale is repeated; None without one."""
    return next((size for size in GROUPS if group_size % size == 0 and columns % size == 0), None)


class Int4Linear(nn.Module):
    """A linear whose weight stays packed, four bits each, also while it is used.

    `values` (out, in) int8 in -8..7, `scale` and `zero` (out, groups), `bias` (out,) or None. Inputs of any floating
    type; outputs have the same.
    """

    def __init__(self, values: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = values.shape
        self.group = kernel_group(self.in_features, self.in_features // scale.shape[1]) or 0
        repeats = self.in_features // self.group // scale.shape[1]
        shift = torch.zeros_like(scale) if zero is None else -zero.to(scale.dtype) * scale
        grid = torch.stack([scale.float(), shift.float()], -1).repeat_interleave(repeats, 1)
        self.register_buffer("packed", _pack(values))
        self.register_buffer("grid", grid.transpose(0, 1).contiguous().to(torch.bfloat16))
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        empty = torch.empty(0, dtype=torch.float32 if bias is None else bias.dtype, device=values.device)
        self.register_buffer("weight", empty, persistent=False)  # some models ask for its type

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        multiply = torch.ops.aten._weight_int4pack_mm if x.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        found: Tensor = multiply(rows, self.packed, self.group, self.grid).to(x.dtype)
        if self.bias is not None:
            found = found + self.bias
        return found.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}"


def _pack(values: Tensor) -> Tensor:
    """What the kernel of the device reads."""
    shifted = values.to(torch.int32) + 8
    if values.is_cuda:
        pairs = (shifted[:, ::2] << 4 | shifted[:, 1::2]).to(torch.uint8)
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, TILES)
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted, 1)
    return packed
