"""Round to nearest: each weight becomes the nearest integer of its grid; no inputs are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epmq_cli.config.validate import check_choice
from epmq_cli.quantize.formats.int import GridSpec, QuantizedWeight, by_group, find_grid, quantize, widths_of
from epmq_cli.quantize.quantizer import NOTHING, LayerProblem, Need, Prepared, QuantizationResult


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
        check_choice("quant.grid", self.grid, ("minmax", "mse"))  # `hessian` needs inputs
        _ = self.format

    @property
    def format(self) -> GridSpec:
        """The grid that these fields describe, at the smaller width where there are two."""
        return GridSpec(self.widths[0], self.group_size, self.symmetric, self.grid)

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing."""
        return frozenset()

    @property
    def widths(self) -> tuple[int, ...]:
        """See Quantizer."""
        return widths_of(self.bits, self.symmetric)

    def at(self, width: int) -> Rtn:
        """See Quantizer."""
        return replace(self, bits=width)

    def prepare(self, hessian: Tensor) -> Prepared:
        """Nothing."""
        return NOTHING

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        """See Quantizer."""
        return QuantizationResult(rtn(layer.weight, self.format, layer.dtype))
