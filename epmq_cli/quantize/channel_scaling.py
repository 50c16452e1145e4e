"""What quantizers that first scale the input channels of a layer share: the scaled weights are rounded by `rounding`.

The caller folds 1 / s into the producer of the layer, see Transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from epmq_cli.config.validate import check_choice
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.gptq import Gptq
from epmq_cli.quantize.quantizer import LayerProblem, Prepared, QuantizationResult, Quantizer
from epmq_cli.quantize.rtn import Rtn

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-4  # of the largest magnitude; smaller channels, including dead ones, get its scale


def around_one(scales: Tensor) -> Tensor:
    """The scales (in,) times a number, with 1 halfway between the smallest and the largest."""
    return scales / (scales.max() * scales.min()).sqrt()


@dataclass(frozen=True)
class ScaledRounding:
    """`format`: see FormatOptions. `rounding`: `rtn` or `gptq`; `grid`, `damping`, `block_size` and `act_order` are its
    options."""

    format: NumberFormat
    rounding: str
    grid: str
    damping: float
    block_size: int
    act_order: bool

    def __post_init__(self) -> None:
        check_choice("quant.rounding", self.rounding, ("rtn", "gptq"))
        Gptq(self.format, "mse", self.damping, self.block_size, self.act_order)  # checks its options
        _ = self.rounder

    @property
    def rounder(self) -> Quantizer:
        """The quantizer of the scaled weights."""
        if self.rounding == "rtn":
            return Rtn(self.format, self.grid)
        return Gptq(self.format, self.grid, self.damping, self.block_size, self.act_order)

    def prepare(self, hessian: Tensor) -> Prepared:
        """See Quantizer."""
        return self.rounder.prepare(hessian)

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        """See Quantizer; the layer's channels are already scaled."""
        return self.rounder.quantize(layer, prepared)
