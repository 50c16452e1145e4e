"""No quantizer: returns the target weight. With `guidance=expert guidance.lam=0` this is RegMean
(https://arxiv.org/abs/2212.09849), layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from epmq_cli.quantize.formats.format import DenseWeight, NumberFormat
from epmq_cli.quantize.quantizer import DataFree, LayerProblem, Prepared, QuantizationResult


@dataclass(frozen=True)
class NoQuantizer(DataFree):
    """`quant=none`."""

    @property
    def format(self) -> NumberFormat | None:
        """None: weights stay dense."""
        return None

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        """Returns the target, rounded to the stored type."""
        return QuantizationResult(DenseWeight(layer.weight.to(layer.dtype).float()))
