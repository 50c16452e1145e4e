"""No quantizer: the target weight itself. With `guidance=expert guidance.lam=0` this is RegMean (2212.09849), layer
by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_cli.quantize.formats.int import DenseWeight, GridSpec
from epmq_cli.quantize.quantizer import NOTHING, Prepared, QuantizationResult


@dataclass(frozen=True)
class NoQuantizer:
    """`quant=none`."""

    @property
    def spec(self) -> GridSpec | None:
        """None: there is no grid."""
        return None

    @property
    def bits(self) -> float:
        """0."""
        return 0.0

    @property
    def widths(self) -> tuple[int, ...]:
        """None."""
        return ()

    def at(self, width: int) -> NoQuantizer:
        """Itself."""
        return self

    def prepared(self, hessian: Tensor) -> Prepared:
        """Nothing."""
        return NOTHING

    def __call__(self, weight: Tensor, hessian: Tensor, prepared: Prepared, dtype: torch.dtype) -> QuantizationResult:
        return QuantizationResult(DenseWeight(weight.to(dtype).float()))
