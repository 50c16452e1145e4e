"""Activation-aware weight quantization (AWQ, https://arxiv.org/abs/2306.00978): scales the input channels that matter.

The input channels of a layer are scaled by s = mean |x|^alpha before it is quantized, so that the weights of channels
with large inputs lose less. A grid search over [0, 1) picks the alpha with the least error of the layer's
outputs, tr (Q(W s) / s - W) H (Q(W s) / s - W)', where Q rounds to nearest over the full range of each group, as in the
paper. The caller folds 1 / s into the producer of the layer. The weights are then quantized by `rounding`.

Clipping, as in the paper's code, shrinks the range of each group to minimize the error of its part of the outputs, with
H approximated as block diagonal. Scaling without it gains little or loses: scaled channels widen the ranges of their
groups. `grid=mse` does not replace it, as it counts the errors of all scaled channels alike and cuts off the weights
that were scaled up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from epmq_cli.config.validate import check_choice, check_range
from epmq_cli.quantize.channel_scaling import SMALLEST, ScaledRounding, around_one
from epmq_cli.quantize.formats.format import NumberFormat, by_group
from epmq_cli.quantize.quantizer import InputStatistics, LayerProblem, Need, Prepared, QuantizationResult
from epmq_cli.quantize.rtn import rtn

if TYPE_CHECKING:
    from torch import Tensor

CLIPS = tuple(1 - step / 20 for step in range(11))  # of the largest weight of a group, as in the paper's code


def channel_scales(magnitude: Tensor, alpha: float) -> Tensor:
    """mean |x|^alpha (in,), with 1 halfway between the smallest and the largest; 1 if all inputs are 0."""
    floor = SMALLEST * magnitude.max()
    if floor == 0:
        return torch.ones_like(magnitude)
    scales = magnitude.clamp(min=floor).pow(alpha)
    return around_one(scales)


def output_error(error: Tensor, hessian: Tensor) -> float:
    """tr E H E' of the error (out, in) of a weight."""
    exact = error.to(hessian.dtype)
    return float(((exact @ hessian) * exact).sum())


def search_alpha(
    weight: Tensor, inputs: InputStatistics, format: NumberFormat, dtype: torch.dtype, candidates: int
) -> float:
    """The alpha among 0, 1 / candidates, ... with the least output error; the smallest on ties."""
    least, best = float("inf"), 0.0
    for number in range(candidates):
        alpha = number / candidates
        scales = channel_scales(inputs.magnitude, alpha).to(weight.dtype)
        scaled = weight * scales
        own = format.for_range(float(scaled.abs().max()))
        rounded = rtn(scaled, own, "minmax", dtype).dequantize() / scales
        error = output_error(rounded - weight, inputs.hessian)
        if error < least:
            least, best = error, alpha
    return best


def clipped(weight: Tensor, hessian: Tensor, format: NumberFormat, dtype: torch.dtype) -> Tensor:
    """The weight (out, in), each group clipped to the range of least output error."""
    groups = by_group(weight, format)
    columns = groups.shape[-1]
    blocks = torch.stack([hessian[i : i + columns, i : i + columns] for i in range(0, len(hessian), columns)])
    largest, H = groups.abs().amax(-1, keepdim=True), blocks.to(weight.dtype)
    best, least = groups, torch.full_like(largest, torch.inf)
    for ratio in CLIPS:
        shrunk = groups.clamp(-ratio * largest, ratio * largest)
        grid = format.fit(shrunk, "minmax", dtype).over_columns()
        error = format.decode(format.encode(shrunk, grid), grid) - groups
        loss = torch.einsum("ogc,gcd,ogd->og", error, H, error)[..., None]
        best, least = torch.where(loss < least, shrunk, best), torch.minimum(loss, least)
    return best.reshape(weight.shape)


@dataclass(frozen=True)
class Awq(ScaledRounding):
    """`quant=awq`, a Quantizer and a Transform.

    `alpha`: one for all layers in [0, 1], or `auto` for the best of `candidates` in each. `clip`: whether groups are
    clipped. The other options: see ScaledRounding.
    """

    alpha: float | Literal["auto"]
    candidates: int
    clip: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha != "auto":
            check_range("quant.alpha", self.alpha, 0, 1)
        check_range("quant.candidates", self.candidates, 1, 1000, integer=True)
        check_choice("quant.clip", self.clip, (True, False))

    @property
    def needs(self) -> frozenset[Need]:
        """The inputs, unless only rounding is left to do."""
        return self.rounder.needs if self.alpha == 0 and not self.clip else frozenset({"inputs"})

    def scales(self, weight: Tensor, inputs: InputStatistics, dtype: torch.dtype) -> Tensor | None:
        """See Transform."""
        alpha = self.alpha
        if alpha == "auto":
            alpha = search_alpha(weight, inputs, self.format, dtype, self.candidates)
        return None if alpha == 0 else channel_scales(inputs.magnitude, float(alpha)).to(weight.dtype)

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        """See Quantizer; the layer's channels are already scaled."""
        if self.clip:
            layer = replace(
                layer, weight=clipped(layer.weight, layer.measured(), layer.in_range(self.format), layer.dtype)
            )
        return super().quantize(layer, prepared)
