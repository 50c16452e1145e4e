"""What every quantizer is and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from epmq_cli.quantize.formats.format import DenseWeight, NumberFormat, QuantizedWeight


@dataclass(frozen=True)
class QuantizationResult:
    """A quantized weight; the relative damping that was used, and how often it had to be raised; where the method could
    not be applied, the name of the one that stood in for it."""

    weight: QuantizedWeight | DenseWeight
    damping: float = 0.0
    retries: int = 0
    fallback: str | None = None


Prepared = tuple[Tensor, tuple[float, int] | None]
"""What a quantizer makes of a hessian before it sees a weight: a tensor, and how it was had; the same for all rows."""
NOTHING: Prepared = (torch.empty(0), None)


class Quantizer(Protocol):
    """A layer-wise quantizer: close to W in the sense of tr (Q - W) H (Q - W)', or simply close to W."""

    @property
    def format(self) -> NumberFormat | None:
        """The number format of the weights; None if they stay dense."""

    def prepared(self, hessian: Tensor) -> Prepared:
        """What this quantizer makes of a hessian (in, in); it depends on the format's group size alone."""

    def __call__(self, weight: Tensor, hessian: Tensor, prepared: Prepared, dtype: torch.dtype) -> QuantizationResult:
        """`weight` float32 (out, in), `hessian` float64 (in, in) and what was prepared of it, `dtype` the type that
        scales are stored in. Rows do not look at each other."""
