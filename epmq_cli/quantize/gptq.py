"""GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323, section 3.3, algorithm 1).

Columns are quantized one by one; the error of each is spread over the remaining columns so that tr (Q - W) H
(Q - W)' is minimal. Its inputs are the target weight W* and the H of the objective instead of the merged weight and
X'X, so that it solves the expert-guided problem (docs/concepts.md).

Departures from the paper. The upper factor of H^-1 comes from one Cholesky factor of H in reversed order and one
triangular solve, instead of two Cholesky factors and an inverse: cheaper and more precise. The grid of a
group that begins inside a block uses all updates so far. Act-order keeps groups whole (see `column_order`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epmq_cli.config.validate import check_choice, check_range
from epmq_cli.quantize.formats.format import SEARCHES, Grid, NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.kernels.select import ColumnKernel, kernel_for
from epmq_cli.quantize.linalg import PANEL, damped_cholesky, invert_triangular
from epmq_cli.quantize.quantizer import LayerProblem, Need, Prepared, QuantizationResult, nothing
from epmq_cli.quantize.rtn import rtn
from epmq_cli.quantize.scale_search import hessian_grid

if TYPE_CHECKING:
    from torch import Tensor


def inverse_factor(
    H: Tensor, damping: float, order: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, float, int] | None:
    """Upper triangular U with U'U = (H + damping * mean(diag H) * I)^-1 in this type or H's, the damping, and the
    number of times that it was raised; None if H has no factor. `order` (n,): of H's rows and columns.

    In reversed order L L' = H; L reversed is an upper M with M M' = H, so U = M^-1 is L^-1 reversed.
    """
    order = torch.arange(len(H), device=H.device) if order is None else order
    factor = damped_cholesky(H, damping, order.flip(0))
    if factor is None:
        return None
    inverse = factor.lower
    invert_triangular(inverse)
    upper = torch.empty(inverse.shape, dtype=dtype or H.dtype, device=inverse.device)
    for start in range(0, len(upper), PANEL):
        rows = upper[start : start + PANEL]
        rows.copy_(inverse[len(upper) - start - len(rows) : len(upper) - start].flip(0, 1))
    return upper, factor.damping, factor.retries


def quantize_columns(
    W: Tensor,
    Hinv: Tensor,
    format: NumberFormat,
    search: str,
    dtype: torch.dtype,
    block_size: int,
    group_of: Tensor,
    columns: ColumnKernel,
) -> tuple[Tensor, Grid]:
    """The loop of algorithm 1: codes (out, in) and their grid.

    `W` (out, in) in the order of quantization, groups whole; `Hinv` the upper factor of H^-1 (in, in), same type and
    order; `group_of` (in,) the group of each column. A group's grid is fitted when its first column is reached, after
    all updates.
    """
    width = W.shape[1]
    size = group_columns(format, width)
    W, codes = W.clone(), torch.empty_like(W, dtype=format.storage)
    step, groups, grids = _aligned(block_size, size, width), group_of.tolist(), dict[int, Grid]()
    for start in range(0, width, step):
        end, group = min(start + step, width), groups[start]
        if start % size == 0:
            ahead = slice(start, start + size)
            grids[group] = _group_grid(W[:, ahead], Hinv[ahead, ahead], format, search, dtype, columns)
        own = W[:, start:end], Hinv[start:end, start:end], grids[group]
        codes[:, start:end], errors = columns.quantize(*own, format)
        W[:, end:] -= errors @ Hinv[start:end, end:]
    return codes, Grid.cat([grids[group] for group in range(width // size)], 1)


def _group_grid(
    weight: Tensor, U: Tensor, format: NumberFormat, search: str, dtype: torch.dtype, columns: ColumnKernel
) -> Grid:
    """The grid of one group of columns, (out, 1)."""
    if search == "hessian":
        return hessian_grid(weight, U, format, dtype, columns)
    return format.fit(weight[:, None], search, dtype)


def column_order(hessian: Tensor, group_size: int, act_order: bool) -> Tensor:
    """The columns in the order of quantization, (in,).

    With `act_order`, groups with a large mean diagonal come first, and likewise the columns inside a group. The
    authors' code orders columns across groups, which requires either an index of each column's group in the checkpoint
    or grids that are fixed before any update. Whole groups fit their grids in the loop, and reach 7 to 30% less loss
    than with fixed grids (grid=hessian; tiny, text4, vision3 at 4, 3 and 2 bits).
    """
    columns = len(hessian)
    if not act_order:
        return torch.arange(columns, device=hessian.device)
    diagonal = hessian.diagonal().reshape(-1, group_size)
    groups = torch.argsort(diagonal.mean(1), descending=True, stable=True)
    inside = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    return (groups[:, None] * group_size + inside[groups]).flatten()


def _aligned(block_size: int, group_size: int, width: int) -> int:
    """The columns of a block inside one group: the whole group, or its largest divisor up to `block_size`."""
    if group_size >= width:
        return block_size
    return max(part for part in range(1, min(block_size, group_size) + 1) if group_size % part == 0)


def prepare(
    hessian: Tensor, group_size: int, damping: float, act_order: bool, dtype: torch.dtype | None = None
) -> Prepared:
    """The upper factor of the inverse (in, in) in this type or that of H, in the order of quantization, and its
    damping and retries; `nothing()` if no damping makes the Hessian positive definite.

    A Hessian of zeros is replaced by the identity.
    """
    H = hessian if hessian.diagonal().any() else torch.eye(len(hessian)).to(hessian)
    factor = inverse_factor(H, damping, column_order(hessian, group_size, act_order), dtype)
    return nothing() if factor is None else (factor[0], factor[1:])


def gptq(
    weight: Tensor,
    hessian: Tensor,
    format: NumberFormat,
    search: str,
    dtype: torch.dtype,
    damping: float,
    block_size: int,
    act_order: bool,
    prepared: Prepared | None = None,
) -> QuantizationResult:
    """Quantizes the weight (out, in) with the least error under the Hessian (in, in).

    `search`: `hessian`, or one of `NumberFormat.fit`. `act_order`: see `column_order`. `prepared`: the result of
    `prepare`, computed here if None. Columns whose input is always zero are rounded to nearest and hardly influence the
    scales, because their diagonal is the damping alone; the authors' code sets it to 1. If no damping makes the Hessian
    positive definite, the weight is rounded to nearest.
    """
    size = group_columns(format, len(hessian))
    Hinv, facts = prepared or prepare(hessian, size, damping, act_order, weight.dtype)
    if facts is None:
        return QuantizationResult(rtn(weight, format, "minmax" if search == "minmax" else "mse", dtype), fallback="rtn")
    order = column_order(hessian, size, act_order)
    ordered, columns, options = weight[:, order], kernel_for(weight, format), (format, search, dtype, block_size)
    codes, grid = quantize_columns(ordered, Hinv.to(weight.dtype), *options, order // size, columns)
    return QuantizationResult(QuantizedWeight(codes[:, torch.argsort(order)], grid, format, dtype), *facts)


@dataclass(frozen=True)
class Gptq:
    """`quant=gptq`.

    `format`: see FormatOptions. `grid`: the fit of scales and zero points: `hessian` minimizes GPTQ's own loss; `mse`
    and `minmax`: see `NumberFormat.fit`. `damping`: added to the diagonal of H, relative to its mean, in (0, 1].
    `block_size`: the maximum number of columns whose updates are applied together; affects only speed. `act_order`: see
    `column_order`.
    """

    format: NumberFormat
    grid: str
    damping: float
    block_size: int
    act_order: bool

    def __post_init__(self) -> None:
        check_choice("quant.grid", self.grid, (*SEARCHES, "hessian"))
        check_range("quant.damping", self.damping, 0, 1, open_low=True)
        check_range("quant.block_size", self.block_size, 1, 1 << 20, integer=True)
        check_choice("quant.act_order", self.act_order, (True, False))

    @property
    def needs(self) -> frozenset[Need]:
        """The Hessian of the inputs."""
        return frozenset({"inputs"})

    def prepare(self, hessian: Tensor) -> Prepared:
        """See Quantizer."""
        size = group_columns(self.format, len(hessian))
        return prepare(hessian, size, self.damping, self.act_order, torch.float32)

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        """See Quantizer."""
        format = layer.in_range(self.format)
        options = (format, self.grid, layer.dtype, self.damping, self.block_size, self.act_order)
        return gptq(layer.weight, layer.measured(), *options, prepared)
