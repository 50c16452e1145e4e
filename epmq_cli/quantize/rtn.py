"""Round to nearest: every weight to the nearest integer of its grid, inputs not looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epmq_cli.config.validate import check_choice
from epmq_cli.quantize.formats.int import GridSpec, QuantizedWeight, by_group, find_grid, quantize, widths_of
from epmq_cli.quantize.quantizer import NOTHING, Prepared, QuantizationResult


def rtn(weight: Tensor, spec: GridSpec, dtype: torch.dtype) -> QuantizedWeight:
    """The weight (out, in) rounded to the grids of its groups; scales are rounded to `dtype` first."""
    grid = find_grid(weight, spec, dtype)
    groups = by_group(weight, spec)
    values = quantize(groups, grid.scale[:, :, None], grid.zero[:, :, None], spec).reshape(weight.shape)
    return QuantizedWeight(values.to(torch.int8), grid.scale, grid.zero, spec, dtype)


@dataclass(frozen=True)
class Rtn:
    """`quant=rtn`; `bits`: see `widths_of`; the other fields are those of GridSpec."""

    bits: float
    group_size: int
    symmetric: bool
    grid: str

    def __post_init__(self) -> None:
        check_choice("quant.grid", self.grid, ("minmax", "mse"))  # nothing else without a look at the inputs
        _ = self.spec

    @property
    def spec(self) -> GridSpec:
        """The grid that these fields describe, at the smaller width where there are two."""
        return GridSpec(self.widths[0], self.group_size, self.symmetric, self.grid)

    @property
    def widths(self) -> tuple[int, ...]:
        """See result.py."""
        return widths_of(self.bits, self.symmetric)

    def at(self, width: int) -> Rtn:
        """See result.py."""
        return replace(self, bits=width)

    def prepared(self, hessian: Tensor) -> Prepared:
        """Nothing."""
        return NOTHING

    def __call__(self, weight: Tensor, hessian: Tensor, prepared: Prepared, dtype: torch.dtype) -> QuantizationResult:
        return QuantizationResult(rtn(weight, self.spec, dtype))
