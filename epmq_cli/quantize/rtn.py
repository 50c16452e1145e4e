"""Round to nearest: each weight becomes the nearest number of its grid; no inputs are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from epmq_cli.config.validate import check_choice
from epmq_cli.quantize.formats.format import CALIBRATED, SEARCHES, NumberFormat, QuantizedWeight, by_group
from epmq_cli.quantize.quantizer import DataFree, LayerProblem, Need, Prepared, QuantizationResult

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def rtn(weight: Tensor, format: NumberFormat, search: str, dtype: torch.dtype) -> QuantizedWeight:
    """The weight (out, in) rounded to the grids of its groups; `search`: see `NumberFormat.fit`; scales are rounded to
    `dtype` first."""
    groups = by_group(weight, format)
    grid = format.fit(groups, search, dtype)
    codes = format.encode(groups, grid.over_columns()).reshape(weight.shape)
    return QuantizedWeight(codes, grid, format, dtype)


@dataclass(frozen=True)
class Rtn(DataFree):
    """`quant=rtn`; `format`: see FormatOptions; `grid`: the fit of scales (`NumberFormat.fit`)."""

    format: NumberFormat
    grid: str

    def __post_init__(self) -> None:
        check_choice("quant.grid", self.grid, SEARCHES)

    @property
    def needs(self) -> frozenset[Need]:
        """The inputs, if the format stores a scale of them."""
        return frozenset({"inputs"} if self.format.activations in CALIBRATED else ())

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        """See Quantizer."""
        return QuantizationResult(rtn(layer.weight, layer.in_range(self.format), self.grid, layer.dtype))
