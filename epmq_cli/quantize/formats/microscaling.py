"""Floating-point numbers of few bits with scales of few bits: the MX formats of the Open Compute Project
(https://arxiv.org/abs/2310.10537) and NVFP4 (https://arxiv.org/abs/2509.25149).

A code is a number with a sign, an exponent and a mantissa: E2M1 (up to 6), E2M3 (up to 7.5) or E4M3 (up to 448). All of
these are E4M3 numbers, which hold the codes in memory. MX: 32 columns share a power of two. NVFP4: 16 columns share an
E4M3 number, which is divided by a global scale of the whole tensor.

Readers multiply in bfloat16, whatever the type of the model. Scales here never become so small that a product of code
and scale is rounded, so that all readers have the same weights.

Departures. The range of an MX group is spanned, as of other formats: its power of two is rounded up. The specification
rounds it down, which cuts the largest weights off; `mse` and GPTQ's search find such scales where they are better.
The global scale of NVFP4 is a power of two with room for weights that GPTQ enlarges; NVIDIA divides the largest weight
by the largest number. E4M3 scales are as precise at half their size, and a power of two keeps products exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from epmq_cli.config.validate import check_choice
from epmq_cli.quantize.formats.format import Activations, Grid, ZeroPoints, fit_grid, in_single

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = {4: 6.0, 6: 7.5, 8: 448.0}
"""The largest number by bits: E2M1, E2M3, E4M3."""
STEP = {4: 0.5, 6: 0.125, 8: 2.0**-9}
"""The distance between the numbers next to 0."""
SMALLEST = 2.0**-120  # no product of a code and a scale is below the smallest normal bfloat16
E4M3_STEP = STEP[8]
HALF = 224.0  # half of the largest E4M3 number


def nearest(x: Tensor, bits: int) -> Tensor:
    """The nearest number of `bits` bits as E4M3; ties go to the even mantissa, larger numbers to the largest."""
    x = x.clamp(-LARGEST[bits], LARGEST[bits])
    if bits < 8:
        size = x.abs()
        step = torch.where(size < 2, STEP[bits], torch.where(size < 4, 2 * STEP[bits], 4 * STEP[bits]))
        x = torch.round(x / step) * step
    return x.to(torch.float8_e4m3fn)


def exact_step(bits: int, dtype: torch.dtype) -> float:
    """The smallest scale whose products with all numbers of `bits` bits are exact in `dtype` and bfloat16."""
    info = torch.finfo(dtype)
    return max(SMALLEST, info.tiny * info.eps / STEP[bits])


class _Microscaling:
    """What MX and NVFP4 share."""

    @property
    def zero_points(self) -> ZeroPoints:
        """None: codes lie symmetrically around 0."""
        return "none"

    @property
    def storage(self) -> torch.dtype:
        """torch's E4M3, which holds all codes."""
        return torch.float8_e4m3fn

    @property
    def mirrored(self) -> bool:
        """True: the sign is a separate bit."""
        return True

    @property
    def scale_bits(self) -> int | None:
        """8."""
        return 8

    @property
    def row_block(self) -> int:
        """1: rows have scales of their own."""
        return 1

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """See NumberFormat."""
        return codes.to(grid.scale.dtype) * grid.scale


@dataclass(frozen=True)
class MxFormat(_Microscaling):
    """`quant.format=mxfp4a16` and so on: `bits` 4, 6 or 8; see NumberFormat."""

    bits: int
    activations: Activations = "none"

    group_size: ClassVar[int] = 32

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, tuple(LARGEST))
        check_choice("activations", self.activations, ("none", "mxfp4", "mxfp8"))

    @property
    def name(self) -> str:
        """mxfp4a16 for weights alone, mxfp4 if the inputs have the same format, mxfp6a8 if they have MXFP8."""
        own = f"mxfp{self.bits}"
        return own if self.activations == own else f"{own}a{'16' if self.activations == 'none' else '8'}"

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        """See NumberFormat. Ties round to the code with the even mantissa."""
        return nearest(x / grid.scale, self.bits)

    def for_range(self, largest: float) -> Self:
        """See NumberFormat."""
        return self

    def for_inputs(self, largest: float) -> Self:
        """See NumberFormat."""
        return self

    def fit(self, groups: Tensor, search: str, dtype: torch.dtype) -> Grid:
        """See NumberFormat."""
        return fit_grid(groups, self, search, dtype)

    def span(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Grid:
        """See NumberFormat. Powers of two, rounded up."""
        scale = (high - low) / (2 * LARGEST[self.bits])
        mantissa, _ = torch.frexp(scale)  # in [0.5, 1)
        power = torch.where(mantissa == 0.5, scale, scale / mantissa).clamp(min=exact_step(self.bits, dtype))
        return Grid(torch.where(scale == 0, 1.0, power), None)


@dataclass(frozen=True)
class Nvfp4Format(_Microscaling):
    """`quant.format=nvfp4a16`, or `nvfp4` with activations; see NumberFormat. `global_scale`: of one tensor, the power
    of two that the scales of its groups are divided by; see `for_range`. `input_global_scale`: the same of a linear's
    inputs, see `for_inputs`."""

    global_scale: float = 1.0
    activations: Activations = "none"
    input_global_scale: float = 1.0

    bits: ClassVar[int] = 4
    group_size: ClassVar[int] = 16

    def __post_init__(self) -> None:
        check_choice("activations", self.activations, ("none", "nvfp4"))

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        """See NumberFormat. Ties round to the code with the even mantissa."""
        return nearest(x / grid.scale, self.bits)

    @property
    def name(self) -> str:
        """nvfp4a16, or nvfp4 with activations."""
        return "nvfp4a16" if self.activations == "none" else "nvfp4"

    def for_range(self, largest: float) -> Nvfp4Format:
        """See NumberFormat. The largest scale of a group is at most half of the largest E4M3 number."""
        if not 0 < largest < math.inf:
            return replace(self, global_scale=1.0)
        exponent = math.floor(math.log2(HALF * LARGEST[4] / largest))
        return replace(self, global_scale=2.0 ** max(-100, min(30, exponent)))

    def for_inputs(self, largest: float) -> Nvfp4Format:
        """See NumberFormat. The largest input gets the largest scale and the largest code, as in compressed-tensors."""
        if self.activations == "none":
            return self
        return replace(self, input_global_scale=in_single(LARGEST[8] * LARGEST[4] / largest) if largest > 0 else 1.0)

    def fit(self, groups: Tensor, search: str, dtype: torch.dtype) -> Grid:
        """See NumberFormat."""
        return fit_grid(groups, self, search, dtype)

    def span(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Grid:
        """See NumberFormat. E4M3 numbers divided by the global scale; 1 divided by it instead of 0."""
        scale = (high - low) / (2 * LARGEST[4]) * self.global_scale
        stored = scale.clamp(max=LARGEST[8]).to(torch.float8_e4m3fn).to(scale.dtype)
        step = max(E4M3_STEP, exact_step(4, dtype) * self.global_scale)
        exact = (torch.round(stored / step) * step).clamp(min=step)
        return Grid(torch.where(scale == 0, 1.0, exact) / self.global_scale, None)
