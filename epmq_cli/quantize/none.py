"""No quantizer: the target weight itself. With `guidance=expert guidance.lam=0` this is RegMean (2212.09849), layer
by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_cli.quantize.formats.format import DenseWeight, NumberFormat
from epmq_cli.quantize.quantizer import NOTHING, Prepared, QuantizationResult


@dataclass(frozen=True)
class NoQuantizer:
    """`quant=none`."""

    @property
    def format(self) -> NumberFormat | None:
        """None: weights stay dense."""
        return None

    def prepared(self, hessian: Tensor) -> Prepared:
        """Nothing."""
        return NOTHING

    def __call__(self, weight: Tensor, hessian: Tensor, prepared: Prepared, dtype: torch.dtype) -> QuantizationResult:
        return QuantizationResult(DenseWeight(weight.to(dtype).float()))
