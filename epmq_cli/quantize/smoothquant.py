"""SmoothQuant (https://arxiv.org/abs/2211.10438): moves the outliers of a layer's inputs into its weights, for formats
that round both.

Input channel j is divided by s_j = max |x_j|^alpha / max |w_j|^(1 - alpha), equation 4, and column j of the weight is
multiplied by it. The scales are then divided by one number, which changes no rounding with scales relative to the
range. Largest inputs are those of the calibration samples of all tasks. The weights are then quantized by `rounding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from epmq_cli.config.validate import check_range
from epmq_cli.errors import ConfigError
from epmq_cli.quantize.channel_scaling import SMALLEST, ScaledRounding, around_one
from epmq_cli.quantize.quantizer import InputStatistics, Need

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def smoothing_scales(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """The scales (in,) of channels with these largest inputs (in,) and weights (in,)."""
    x, w = (part.double() for part in (inputs, weights))
    if not x.any() or not w.any():
        return around_one(x.new_ones(len(x)))
    x, w = (part.clamp(min=SMALLEST * float(part.max())) for part in (x, w))
    return around_one(x.pow(alpha) / w.pow(1 - alpha))


@dataclass(frozen=True)
class SmoothQuant(ScaledRounding):
    """`quant=smoothquant`, a Quantizer and a Transform. `alpha`: the share of the range that moves, in [0, 1]; see
    ScaledRounding."""

    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("quant.alpha", self.alpha, 0, 1)
        if self.format.activations == "none":
            raise ConfigError(
                f"quant=smoothquant is for formats that round the inputs of linears, such as w8a8, got "
                f"quant.format={self.format.name}; use quant.format=w8a8 bits=8 group_size=-1, or quant=awq"
            )

    @property
    def needs(self) -> frozenset[Need]:
        """The inputs."""
        return frozenset({"inputs"})

    def scales(self, weight: Tensor, inputs: InputStatistics, dtype: torch.dtype) -> Tensor | None:
        """See Transform."""
        return smoothing_scales(inputs.largest, weight.abs().amax(0), self.alpha).to(weight.dtype)
