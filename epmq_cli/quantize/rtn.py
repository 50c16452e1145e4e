"""Round to nearest: every weight to the nearest integer of its grid, inputs not looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_cli.quantize.grid import GridSpec, QuantizedWeight, find_grid, quantize
from epmq_cli.quantize.result import Outcome


def rtn(weight: Tensor, spec: GridSpec, dtype: torch.dtype) -> QuantizedWeight:
    """The weight (out, in) rounded to the grids of its groups; scales are rounded to `dtype` first."""
    grid = find_grid(weight, spec, dtype)
    groups = weight.reshape(len(weight), grid.scale.shape[1], -1)
    values = quantize(groups, grid.scale[:, :, None], grid.zero[:, :, None], spec).reshape(weight.shape)
    return QuantizedWeight(values.to(torch.int8), grid.scale, grid.zero, spec, dtype)


@dataclass(frozen=True)
class Rtn:
    """`quant=rtn`; the fields are those of GridSpec."""

    bits: int
    group_size: int
    symmetric: bool
    grid: str

    def __post_init__(self) -> None:
        _ = self.spec

    @property
    def spec(self) -> GridSpec:
        """The grid that these fields describe."""
        return GridSpec(self.bits, self.group_size, self.symmetric, self.grid)

    def __call__(self, weight: Tensor, hessian: Tensor, dtype: torch.dtype) -> Outcome:
        return Outcome(rtn(weight, self.spec, dtype))
