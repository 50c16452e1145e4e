"""Weights as blocks of GGML (https://github.com/ggml-org/llama.cpp, ggml-common.h): 32 neighbouring inputs of a row.

- Q8_0: float16 scale d, 32 int8 q; the weight is q d.
- Q4_0: d, 16 bytes with the numbers q + 8 of inputs i (low half) and i + 16 (high half); the weight is q d.
- Q4_1: d, float16 minimum m, 16 bytes with u in 0 .. 15; the weight is u d + m.

Codes and scales of epmq become blocks as they are, so that nothing is rounded again. A group of more than 32 inputs
becomes several blocks with the same scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.int import IntFormat

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
"""The inputs of a block."""


def kind_of(format: NumberFormat) -> str:
    """The type of the blocks that hold a format. ConfigError if there is none."""
    kind = {(4, "none"): "Q4_0", (4, "whole"): "Q4_1", (8, "none"): "Q8_0"}.get((format.bits, format.zero_points))
    if kind is None or not isinstance(format, IntFormat):
        points = "" if format.zero_points == "none" else f" with {format.zero_points} zero points"
        raise ConfigError(
            f"GGUF holds 4 bits, and 8 bits without zero points, got {format.name}{points}; use bits=4 or bits=8"
        )
    return kind


def check_blocks(name: str, columns: int, format: NumberFormat) -> None:
    """ConfigError if blocks cannot hold the groups of a linear with this many inputs."""
    kind_of(format)
    size = group_columns(format, columns)
    if size % BLOCK:
        raise ConfigError(
            f"GGUF needs groups that are multiples of {BLOCK} inputs, got {size} in {name}; use group_size={BLOCK}"
        )


def packed(weight: QuantizedWeight) -> Tensor:
    """The blocks of a weight: uint8 (out, bytes). Scales are rounded to float16; see `rounding`."""
    kind, (rows, columns) = kind_of(weight.format), weight.shape
    codes = weight.codes.cpu().reshape(rows, columns // BLOCK, BLOCK)
    repeat = group_columns(weight.format, columns) // BLOCK
    head = [_bytes(_per_block(weight.grid.scale, repeat))]
    if kind == "Q8_0":
        return torch.cat([*head, codes.view(torch.uint8)], 2).reshape(rows, -1)
    if kind == "Q4_1":
        head.append(_bytes(_per_block(minima(weight), repeat)))
    unsigned = (codes + 8).to(torch.uint8)
    halves = unsigned[..., : BLOCK // 2] | unsigned[..., BLOCK // 2 :] << 4
    return torch.cat([*head, halves], 2).reshape(rows, -1)


def minima(weight: QuantizedWeight) -> Tensor:
    """What the smallest code of each group represents: (out, groups)."""
    return (-8 - weight.grid.zeros) * weight.grid.scale


def rounding(weight: QuantizedWeight) -> float:
    """The largest error, in steps of the grid, that float16 adds to a weight: 0 for most, because scales of float16 and
    bfloat16 fit; infinity if a scale is too large or too small."""
    scale = weight.grid.scale.float()
    parts = [scale] if kind_of(weight.format) != "Q4_1" else [scale, minima(weight).float()]
    if any(not part.half().isfinite().all() for part in parts) or (scale.half() == 0).any():
        return float("inf")
    span = 1 << weight.format.bits
    errors = [(part - part.half().float()).abs() / scale.abs() for part in parts]
    return float(sum(error.max() * (span if place == 0 else 1) for place, error in enumerate(errors)))


def quantized(tensor: Tensor, kind: str) -> Any:
    """A dense tensor as GGML stores it, by the rounding of the package gguf: an array of bytes."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(tensor.contiguous().numpy(), GGMLQuantizationType[kind]).view(np.uint8)


def _per_block(groups: Tensor, repeat: int) -> Tensor:
    """Numbers (out, groups) for each block."""
    return groups.float().cpu().repeat_interleave(repeat, 1)


def _bytes(numbers: Tensor) -> Tensor:
    """Numbers (out, blocks) as float16: uint8 (out, blocks, 2)."""
    return numbers.half().contiguous().view(torch.uint8).reshape(*numbers.shape, 2)
