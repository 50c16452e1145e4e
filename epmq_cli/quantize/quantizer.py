"""What every quantizer is and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from epmq_cli.quantize.formats.int import DenseWeight, GridSpec, QuantizedWeight


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
    def spec(self) -> GridSpec | None:
        """The grid, at the smallest of the widths; None where nothing is quantized."""

    @property
    def bits(self) -> float:
        """The width of the quantized weights on average, at most; 0 without a grid."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that a linear can get: one width, or two where `bits` lies between them; none without a grid."""

    def at(self, width: int) -> Quantizer:
        """The same quantizer with this width alone."""

    def prepared(self, hessian: Tensor) -> Prepared:
        """What this quantizer, at any of its widths, makes of a hessian (in, in)."""

    def __call__(self, weight: Tensor, hessian: Tensor, prepared: Prepared, dtype: torch.dtype) -> QuantizationResult:
        """`weight` float32 (out, in), `hessian` float64 (in, in) and what was prepared of it, `dtype` the type that
        scales are stored in. Rows do not look at each other."""
