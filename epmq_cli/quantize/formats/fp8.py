"""FP8 weights: E4M3 with a scale, as compressed-tensors' float-quantized stores them (https://arxiv.org/abs/2209.05433).

A code c is one of 253 numbers up to 448 with 3 bits of mantissa, and represents c scale. The format has no infinities,
and NaN is never written. Errors are relative to the size of each weight, down to 2^-6 of the scale. So outliers cost
little, and one scale per row (group_size=-1) is nearly as good as groups. vLLM's sources have no kernels for FP8 in
groups. With activations, engines round the inputs to FP8 too, with a scale per token.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    stored_scale,
)

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn


@dataclass(frozen=True)
class Fp8Format(PlainScales):
    """`quant.format=fp8`, or `fp8_dynamic` with activations; see NumberFormat."""

    group_size: int
    activations: Activations = "none"

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        check_choice("activations", self.activations, ("none", "fp8"))

    @property
    def name(self) -> str:
        """fp8, or fp8_dynamic with activations."""
        return "fp8" if self.activations == "none" else "fp8_dynamic"

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
