"""AutoRound (Cheng et al. 2023, https://arxiv.org/abs/2309.05516) on the objective of a layer: signed gradient steps on
J(Q) = tr (Q - W) H (Q - W)', over offsets of the rounding and the clipping of each group.

Departures from the paper. J is quadratic, so one product with H has the gradient over all samples; the paper draws
samples and measures the output of a block, as `refine=blocks` does. The steps start at the integers of GPTQ and
change them as rounding.py says. Each row keeps its best iterate, so that its J is at most that of GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.config.validate import check_clip, check_range
from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import Grid, NumberFormat, QuantizedWeight
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.gptq import Gptq
from epmq_cli.quantize.quantizer import LayerProblem, Need, Prepared, QuantizationResult
from epmq_cli.quantize.rounding import LearnedRounding, RoundingOptions

if TYPE_CHECKING:
    from torch import Tensor


def auto_round(
    start: QuantizedWeight, target: Tensor, hessian: Tensor, options: RoundingOptions, iterations: int
) -> QuantizedWeight:
    """The weight with the least tr (Q - W) H (Q - W)' of each row among the iterates, which include the start.

    `target` W (out, in) and `hessian` H (in, in), of one type.
    """
    learned = LearnedRounding(start, target, options)
    codes, scale = start.codes, start.grid.scale
    least = torch.full_like(target[:, 0], torch.inf)
    for step in range(iterations + 1):
        own = learned.weight()
        error = own.dequantize().to(target.dtype) - target
        gradient = error @ hessian
        loss = (gradient * error).sum(1)
        better = (loss < least)[:, None]
        least = torch.minimum(loss, least)
        codes, scale = torch.where(better, own.codes, codes), torch.where(better, own.grid.scale, scale)
        learned.step(gradient, 1 - step / iterations)
    return replace(start, codes=codes, grid=Grid(scale, start.grid.zero))


@dataclass(frozen=True)
class AutoRound:
    """`quant=autoround`.

    `format`: integers, see FormatOptions. `grid`, `damping`, `block_size`, `act_order`: of GPTQ, which the steps start
    from. `iterations`: their number. `rounding_lr`, `scale_lr`: the learning rates of the offsets, in steps of the
    grid, and of the scales, relative; both fall linearly to 0. `reach`: the largest offset. `clip_range`: the smallest
    the largest factor of a scale.
    """

    format: NumberFormat
    grid: str
    damping: float
    block_size: int
    act_order: bool
    iterations: int
    rounding_lr: float
    scale_lr: float
    reach: float
    clip_range: Any

    def __post_init__(self) -> None:
        _ = self.start
        if not isinstance(self.format, IntFormat):
            raise ConfigError(
                f"quant=autoround rounds to integers, got quant.format={self.format.name}; use quant.format=int"
            )
        check_range("quant.iterations", self.iterations, 1, 1_000_000, integer=True)
        check_range("quant.rounding_lr", self.rounding_lr, 0, 1)
        check_range("quant.scale_lr", self.scale_lr, 0, 1)
        check_range("quant.reach", self.reach, 0, 1000, open_low=True)
        check_clip("quant.clip_range", self.clip_range)

    @property
    def start(self) -> Gptq:
        """The quantizer whose result the steps start from."""
        return Gptq(self.format, self.grid, self.damping, self.block_size, self.act_order)

    @property
    def needs(self) -> frozenset[Need]:
        """The Hessian of the inputs."""
        return frozenset({"inputs"})

    def prepare(self, hessian: Tensor) -> Prepared:
        """See Quantizer."""
        return self.start.prepare(hessian)

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        """See Quantizer."""
        result = self.start.quantize(layer, prepared)
        if result.fallback is not None or not isinstance(result.weight, QuantizedWeight):
            return result
        options = RoundingOptions(self.rounding_lr, self.reach, self.scale_lr, (self.clip_range[0], self.clip_range[1]))
        target = layer.weight.to(
            layer.measured().dtype
        )  # so that signs of gradients hardly depend on the split of rows
        return replace(result, weight=auto_round(result.weight, target, layer.measured(), options, self.iterations))
