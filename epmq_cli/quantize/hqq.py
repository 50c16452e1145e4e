"""Half-quadratic quantization (HQQ, https://mobiusml.github.io/hqq_blog/): no inputs, and robust to outlier weights.

With scale s and zero point z of a group, a weight w becomes s (q - z). HQQ minimises sum |w - s (q - z)|^p, p < 1, by
half-quadratic splitting: with an auxiliary e for the error,

    e <- shrink(w / s - (q - z))        shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    z <- mean(q - (w / s - e))          beta <- kappa beta

Departures from the paper. Errors are in steps of the scale, so that beta has the same meaning in every layer; in units
of the weights the published beta shrinks all errors to 0, and z becomes a plain mean. Whole zero points are rounded in
every iteration; because a mean rarely moves them by half a step, the scale is solved as well, by the closed form of
the same splitting, s <- s <q - z, w / s - e> / <q - z, q - z>. Each group keeps the best iterate, so that its error
never exceeds that of the full range it starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from epmq_cli.config.validate import check_choice, check_range
from epmq_cli.quantize.formats.format import Grid, QuantizedWeight, by_group, fit_grid, stored_scale
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.quantizer import DataFree, LayerProblem, Prepared, QuantizationResult

if TYPE_CHECKING:
    from torch import Tensor


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The generalised soft threshold of the lp norm (its exact proximal operator for p = 1)."""
    return x.sign() * (x.abs() - x.abs().pow(p - 1) / beta).clamp(min=0)


def lp_error(groups: Tensor, grid: Grid, format: IntFormat, p: float) -> Tensor:
    """sum |w - s (q - z)|^p of each group: groups (..., columns), grid and result (...)."""
    own = grid.over_columns()
    return (groups - format.decode(format.encode(groups, own), own)).abs().pow(p).sum(-1)


def solve_grid(
    groups: Tensor,
    format: IntFormat,
    dtype: torch.dtype,
    p: float,
    beta: float,
    kappa: float,
    iterations: int,
    solve_scale: bool,
) -> Grid:
    """The grid (...) of groups (..., columns) by half-quadratic splitting from the full range.

    `dtype`: the type that scales are stored in. `solve_scale`: whether scales move too.
    """
    grid = best = fit_grid(groups, format, "minmax", dtype)
    least = lp_error(groups, best, format, p)
    for _ in range(iterations):
        own = grid.over_columns()
        codes, steps = format.encode(groups, own).to(groups.dtype), groups / own.scale
        target = steps - shrink(steps - (codes - own.zeros), beta, p)
        zero = (codes - target).mean(-1)
        if format.zero_points == "whole":
            zero = zero.round().clamp(format.lowest, format.highest)
        scale = _best_scale(grid.scale, codes - zero[..., None], target, dtype) if solve_scale else grid.scale
        grid, beta = Grid(scale, zero), beta * kappa
        error = lp_error(groups, grid, format, p)
        better = error < least
        least, best = torch.where(better, error, least), grid.where(better, best)
    return best


def _best_scale(scale: Tensor, centred: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale (...) of least squares between s (q - z) and the target, which is in steps of the present scale; that
    scale if the solution is not positive. `centred` q - z and `target` (..., columns)."""
    product, square = (centred * target).sum(-1), centred.square().sum(-1)
    ratio = torch.where(product > 0, product / square.clamp(min=torch.finfo(scale.dtype).tiny), 1.0)
    return stored_scale(scale * ratio, dtype)


@dataclass(frozen=True)
class Hqq(DataFree):
    """`quant=hqq`.

    `bits`, `group_size`: see NumberFormat. `zero_point`: `integer`, which checkpoints can store, or `real` as in the
    paper. `solve_scale`: whether scales are solved too. `lp_norm`: p in (0, 1]. `beta` and `kappa`: the weight of the
    splitting and its growth in each of the `iterations`.
    """

    bits: int
    group_size: int
    zero_point: Literal["integer", "real"]
    solve_scale: bool
    lp_norm: float
    beta: float
    kappa: float
    iterations: int

    def __post_init__(self) -> None:
        check_choice("quant.zero_point", self.zero_point, ("integer", "real"))
        _ = self.format
        check_choice("quant.solve_scale", self.solve_scale, (True, False))
        check_range("quant.lp_norm", self.lp_norm, 0, 1, open_low=True)
        check_range("quant.beta", self.beta, 0, 1e9, open_low=True)
        check_range("quant.kappa", self.kappa, 1, 10)
        check_range("quant.iterations", self.iterations, 0, 10_000, integer=True)

    @property
    def format(self) -> IntFormat:
        """Integers with zero points."""
        return IntFormat(self.bits, self.group_size, "whole" if self.zero_point == "integer" else "real")

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        """See Quantizer."""
        format, groups = self.format, by_group(layer.weight, self.format)
        options = (self.lp_norm, self.beta, self.kappa, self.iterations, self.solve_scale)
        grid = solve_grid(groups, format, layer.dtype, *options)
        codes = format.encode(groups, grid.over_columns()).reshape(layer.weight.shape)
        return QuantizationResult(QuantizedWeight(codes, grid, format, layer.dtype))
