"""Weights as blocks of GGML (https://github.com/ggml-org/llama.cpp, ggml-common.h): neighbouring inputs of a row, with
float16 scales.

Blocks of 32 inputs: Q8_0, Q4_0, Q5_0 hold q d, and Q4_1, Q5_1 hold u d + m. A K-quant of 256 inputs has a scale d,
which 16 parts multiply by integers of their own: here they are 1, because scales of different groups are no multiples
of each other. So Q2_K, which holds u d - m d with m in 0 .. 15, and Q3_K and Q6_K, which hold q d, take groups of 256.

Codes and scales of epmq become blocks as they are, so that nothing is rounded again. A group of more inputs than a
block becomes several blocks with the same scale. No block holds 7 bits, or the zero points of 3, 6 and 8 bits.
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
SUPER = 256
"""The inputs of a block of a K-quant."""
KINDS = {
    (2, "none"): "Q2_K",
    (2, "whole"): "Q2_K",
    (3, "none"): "Q3_K",
    (4, "none"): "Q4_0",
    (4, "whole"): "Q4_1",
    (5, "none"): "Q5_0",
    (5, "whole"): "Q5_1",
    (6, "none"): "Q6_K",
    (8, "none"): "Q8_0",
}
"""The types of blocks by bits and zero points."""
UNIT = 33  # the scale 1 of a part of Q3_K, which adds 32 to it


def kind_of(format: NumberFormat) -> str:
    """The type of the blocks that hold a format. ConfigError if there is none."""
    kind = KINDS.get((format.bits, format.zero_points))
    if kind is None or not isinstance(format, IntFormat):
        points = "" if format.zero_points == "none" else f" with {format.zero_points} zero points"
        raise ConfigError(
            "GGUF holds integers of 2, 4 and 5 bits, and of 3, 6 and 8 bits without zero points, got "
            f"{format.name}{points}; use bits=4, 5 or 8"
        )
    return kind


def check_blocks(name: str, columns: int, format: NumberFormat) -> None:
    """ConfigError if blocks cannot hold the groups of a linear with this many inputs."""
    least, size = _block_size(kind_of(format)), group_columns(format, columns)
    if size % least:
        other = "" if least == BLOCK else f", or bits=4 with group_size={BLOCK}"
        raise ConfigError(
            f"GGUF needs groups that are multiples of {least} inputs at {format.bits} bits, got {size} in {name}; use "
            f"group_size={least}{other}"
        )


def packed(weight: QuantizedWeight) -> Tensor:
    """The blocks of a weight: uint8 (out, bytes). Scales are rounded to float16; see `rounding`."""
    kind, (rows, columns) = kind_of(weight.format), weight.shape
    size, repeat = _block_size(kind), group_columns(weight.format, columns) // _block_size(kind)
    codes = weight.codes.cpu().reshape(rows, columns // size, size)
    u = (codes.short() + (1 << (weight.format.bits - 1))).to(torch.uint8)
    d = _bytes(_per_block(weight.grid.scale, repeat))
    if kind == "Q8_0":
        parts = [d, codes.view(torch.uint8)]
    elif kind == "Q2_K":
        low = _per_block(weight.grid.zeros + 2, repeat).to(torch.uint8)[..., None]
        parts = [(1 | low << 4).expand(-1, -1, 16), interleaved(u, 2, 32), d, d]
    elif kind == "Q3_K":
        ones = torch.tensor([(UNIT & 15) * 0x11] * 8 + [(UNIT >> 4) * 0x55] * 4, dtype=torch.uint8)
        parts = [interleaved(u >> 2, 1, 32), interleaved(u & 3, 2, 32), ones.expand(*d.shape[:2], -1), d]
    elif kind == "Q6_K":
        ones = torch.ones(*d.shape[:2], 16, dtype=torch.uint8)
        parts = [interleaved(u & 15, 4, 64), interleaved(u >> 4, 2, 32), ones, d]
    else:
        minimum = [_bytes(_per_block(minima(weight), repeat))] if kind.endswith("_1") else []
        fifth = [interleaved(u >> 4, 1, 1)] if weight.format.bits == 5 else []
        parts = [d, *minimum, *fifth, interleaved(u & 15, 4, 16)]
    return torch.cat(parts, 2).reshape(rows, -1)


def interleaved(numbers: Tensor, bits: int, stride: int) -> Tensor:
    """Numbers of `bits` bits (..., columns) as bytes: byte i of every `stride` bytes holds the numbers i, i + stride,
    i + 2 stride and so on of the run, from its lowest bits on."""
    *outer, columns = numbers.shape
    count = 8 // bits
    runs = numbers.reshape(*outer, columns // (count * stride), count, stride)
    filled = [runs[..., place, :] << (bits * place) for place in range(count)]
    return torch.stack(filled).sum(0, dtype=torch.uint8).reshape(*outer, -1)


def minima(weight: QuantizedWeight) -> Tensor:
    """What the smallest code of each group represents: (out, groups)."""
    return (-(1 << (weight.format.bits - 1)) - weight.grid.zeros) * weight.grid.scale


def rounding(weight: QuantizedWeight) -> float:
    """The largest error, in steps of the grid, that float16 adds to a weight: 0 for most, because scales of float16 and
    bfloat16 fit; infinity if a scale is too large or too small."""
    scale = weight.grid.scale.float()
    parts = [scale, minima(weight).float()] if kind_of(weight.format).endswith("_1") else [scale]
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


def _block_size(kind: str) -> int:
    return SUPER if kind.endswith("_K") else BLOCK


def _per_block(groups: Tensor, repeat: int) -> Tensor:
    """Numbers (out, groups) for each block."""
    return groups.float().cpu().repeat_interleave(repeat, 1)


def _bytes(numbers: Tensor) -> Tensor:
    """Numbers (out, blocks) as float16: uint8 (out, blocks, 2)."""
    return numbers.half().contiguous().view(torch.uint8).reshape(*numbers.shape, 2)
