"""FP8 weights: E4M3 with a scale, as compressed-tensors' float-quantized stores them (https://arxiv.org/abs/2209.05433).

A code c is one of 253 numbers up to 448 with 3 bits of mantissa, and represents c scale. The format has no infinities,
and NaN is never written. Errors are relative to the size of each weight, down to 2^-6 of the scale. So outliers cost
little, and one scale per row (group_size=-1) is nearly as good as groups. vLLM's sources have no kernels for FP8 in
groups. With activations, engines round the inputs to FP8 too: with a scale per token, with one scale that calibration
measures, or, where blocks of 128 x 128 weights share a scale (https://arxiv.org/abs/2412.19437, section 3.3.2), with a
scale for 128 inputs of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from epmq_cli.config.validate import check_choice
from epmq_cli.quantize.formats.format import (
    Activations,
    Grid,
    PlainScales,
    ZeroPoints,
    check_group_size,
    fit_grid,
    in_single,
    stored_scale,
)

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn
BLOCK = 128
"""The rows, and columns, of a block of weights that share a scale."""
NAMES: dict[Activations, str] = {
    "none": "fp8",
    "fp8": "fp8_dynamic",
    "fp8_static": "fp8_static",
    "fp8_group": "fp8_block",
}


@dataclass(frozen=True)
class Fp8Format(PlainScales):
    """`quant.format=fp8`, or one of `NAMES` with activations; see NumberFormat. `input_scale`: of one linear with
    static activations, its largest input divided by 448."""

    group_size: int
    activations: Activations = "none"
    row_block: int = 1
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        check_choice("activations", self.activations, tuple(NAMES))
        check_choice("row_block", self.row_block, (1, BLOCK))

    @property
    def name(self) -> str:
        """fp8, or the name of its activations."""
        return NAMES[self.activations]

    @property
    def bits(self) -> int:
        """8."""
        return 8

    @property
    def zero_points(self) -> ZeroPoints:
        """None: codes lie symmetrically around 0."""
        return "none"

    @property
    def storage(self) -> torch.dtype:
        """torch's E4M3."""
        return torch.float8_e4m3fn

    @property
    def mirrored(self) -> bool:
        """True: the sign is a separate bit."""
        return True

    def for_inputs(self, largest: float) -> Fp8Format:
        """See NumberFormat."""
        if self.activations != "fp8_static":
            return self
        return replace(self, input_scale=in_single(largest / LARGEST) if largest > 0 else 1.0)

    def fit(self, groups: Tensor, search: str, dtype: torch.dtype) -> Grid:
        """See NumberFormat."""
        return fit_grid(groups, self, search, dtype)

    def span(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Grid:
        """See NumberFormat."""
        return Grid(stored_scale((high - low) / (2 * LARGEST), dtype), None)

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        """See NumberFormat. Ties round to the code with the even mantissa."""
        return (x / grid.scale).clamp(-LARGEST, LARGEST).to(self.storage)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """See NumberFormat."""
        return codes.to(grid.scale.dtype) * grid.scale
