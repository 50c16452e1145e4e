"""GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323, section 3.3, algorithm 1).

Columns are quantized one by one; the error of each is spread over those that are still to come so that tr (Q - W) H
(Q - W)' stays least. It is given the target weight W* and the H of its objective instead of the merged weight and
X'X, and so solves the expert-guided problem (docs: README, "The method").

Departures from the paper: the upper factor of H^-1 comes from one Cholesky of H with its order reversed and one
triangular solve instead of two Cholesky factors and an inverse, which is cheaper and loses fewer digits; grids of a
group that begins inside a block see all updates made so far; act-order keeps groups whole (see `column_order`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epmq_cli.config.validate import check_choice, check_range
from epmq_cli.quantize.formats.int import Grid, GridSpec, QuantizedWeight, find_grid, widths_of
from epmq_cli.quantize.kernels.select import ColumnKernel, kernel_for
from epmq_cli.quantize.linalg import damped_cholesky, triangular_inverse
from epmq_cli.quantize.quantizer import NOTHING, Prepared, QuantizationResult
from epmq_cli.quantize.rtn import rtn
from epmq_cli.quantize.scale_search import hessian_grid


def inverse_factor(H: Tensor, damping: float) -> tuple[Tensor, float, int] | None:
    """Upper triangular U with U'U = (H + damping * mean(diag H) * I)^-1, the damping used, and how often it had to be
    raised; None if there is none.

    With the order of H reversed, L L' = H; L reversed is an upper M with M M' = H, so that U = M^-1, L^-1 reversed.
    """
    factor = damped_cholesky(H, damping, backwards=True)
    if factor is None:
        return None
    return triangular_inverse(factor.lower).flip(0, 1), factor.damping, factor.retries


def quantize_columns(
    W: Tensor,
    Hinv: Tensor,
    spec: GridSpec,
    dtype: torch.dtype,
    block_size: int,
    group_of: Tensor,
    columns: ColumnKernel,
) -> tuple[Tensor, Grid]:
    """The loop of algorithm 1: integers (out, in) in W's type, and the grid they are on.

    `W` (out, in) in the order of quantization, groups whole; `Hinv` the upper factor of H^-1 (in, in), same type and
    order; `group_of` (in,) the group of each column. A group's grid is found when its first column is reached, with all
    updates made.
    """
    rows, width = W.shape
    size = spec.columns(width)
    W, values = W.clone(), torch.empty_like(W)
    grid = Grid(W.new_empty(rows, width // size), W.new_empty(rows, width // size))
    step, groups = _aligned(block_size, size, width), group_of.tolist()
    for start in range(0, width, step):
        end, group = min(start + step, width), slice(groups[start], groups[start] + 1)
        if start % size == 0:
            ahead = slice(start, start + size)
            found = _group_grid(W[:, ahead], Hinv[ahead, ahead], spec, dtype, columns)
            grid.scale[:, group], grid.zero[:, group] = found.scale, found.zero
        own = Grid(grid.scale[:, group], grid.zero[:, group])
        values[:, start:end], errors = columns.walk(W[:, start:end], Hinv[start:end, start:end], own, spec)
        W[:, end:] -= errors @ Hinv[start:end, end:]
    return values, grid


def _group_grid(weight: Tensor, U: Tensor, spec: GridSpec, dtype: torch.dtype, columns: ColumnKernel) -> Grid:
    """The grid of one group of columns, (out, 1)."""
    if spec.search == "hessian":
        return hessian_grid(weight, U, spec, dtype, columns)
    return find_grid(weight, GridSpec(spec.bits, -1, spec.symmetric, spec.search), dtype)


def column_order(hessian: Tensor, group_size: int, act_order: bool) -> Tensor:
    """The columns in the order of quantization, (in,).

    With `act_order` groups of large mean diagonal come first, and inside a group its columns likewise. The authors'
    code orders columns across groups, which takes either an index of each column's group in the checkpoint or grids
    fixed before anything was made up for; whole groups find theirs on the way and end with 7 to 30% less loss than
    fixed ones (searched by hessian; tiny, text4, vision3 at 4, 3 and 2 bits).
    """
    columns = len(hessian)
    if not act_order:
        return torch.arange(columns, device=hessian.device)
    diagonal = hessian.diagonal().reshape(-1, group_size)
    groups = torch.argsort(diagonal.mean(1), descending=True, stable=True)
    inside = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    return (groups[:, None] * group_size + inside[groups]).flatten()


def _aligned(block_size: int, group_size: int, width: int) -> int:
    """The columns of a block, which is in one group: the group itself, or the largest part of it up to `block_size`."""
    if group_size >= width:
        return block_size
    return max(part for part in range(1, min(block_size, group_size) + 1) if group_size % part == 0)


def prepare(hessian: Tensor, group_size: int, damping: float, act_order: bool) -> Prepared:
    """The upper factor of the inverse (in, in), in the order of quantization, and its damping and retries; nothing
    where no damping makes the hessian positive definite.

    A hessian of zeros stands for one that tells nothing of the inputs.
    """
    H = hessian if hessian.diagonal().any() else torch.eye(len(hessian)).to(hessian)
    order = column_order(hessian, group_size, act_order)
    found = inverse_factor(H[order][:, order] if act_order else H, damping)
    return NOTHING if found is None else (found[0], found[1:])


def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: GridSpec,
    dtype: torch.dtype,
    damping: float,
    block_size: int,
    act_order: bool,
    prepared: Prepared | None = None,
) -> QuantizationResult:
    """The weight (out, in) on its grid, near it in the sense of the hessian (in, in).

    `act_order`: see `column_order`. `prepared`: what `prepare` gives, made here unless given. Columns whose input is
    always zero are rounded to nearest, and have hardly a say in the scales: nothing but the damping is on their
    diagonal, where the authors' code puts 1. Where no damping makes the hessian positive definite, round to nearest
    stands in.
    """
    size = spec.columns(len(hessian))
    Hinv, had = prepared or prepare(hessian, size, damping, act_order)
    if had is None:
        return QuantizationResult(rtn(weight, spec, dtype), fallback="rtn")
    order = column_order(hessian, size, act_order)
    ordered, columns = weight[:, order], kernel_for(weight)
    values, grid = quantize_columns(ordered, Hinv.to(weight.dtype), spec, dtype, block_size, order // size, columns)
    values = values[:, torch.argsort(order)].to(torch.int8)
    return QuantizationResult(QuantizedWeight(values, grid.scale, grid.zero, spec, dtype), *had)


@dataclass(frozen=True)
class Gptq:
    """`quant=gptq`.

    `bits`: see `widths_of`. `group_size`, `symmetric`, `grid`: see GridSpec. `damping`: added to H's diagonal,
    relative to its mean, in (0, 1]. `block_size`: columns whose updates are kept back and done at once, at most, for
    speed alone. `act_order`: see `column_order`.
    """

    bits: float
    group_size: int
    symmetric: bool
    grid: str
    damping: float
    block_size: int
    act_order: bool

    def __post_init__(self) -> None:
        _ = self.spec
        check_range("quant.damping", self.damping, 0, 1, open_low=True)
        check_range("quant.block_size", self.block_size, 1, 1 << 20, integer=True)
        check_choice("quant.act_order", self.act_order, (True, False))

    @property
    def spec(self) -> GridSpec:
        """The grid that these fields describe, at the smaller width where there are two."""
        return GridSpec(self.widths[0], self.group_size, self.symmetric, self.grid)

    @property
    def widths(self) -> tuple[int, ...]:
        """See result.py."""
        return widths_of(self.bits, self.symmetric)

    def at(self, width: int) -> Gptq:
        """See result.py."""
        return replace(self, bits=width)

    def prepared(self, hessian: Tensor) -> Prepared:
        """See result.py."""
        Hinv, had = prepare(hessian, self.spec.columns(len(hessian)), self.damping, self.act_order)
        return Hinv.float(), had

    def __call__(self, weight: Tensor, hessian: Tensor, prepared: Prepared, dtype: torch.dtype) -> QuantizationResult:
        options = (self.spec, dtype, self.damping, self.block_size, self.act_order)
        return gptq(weight, hessian, *options, prepared)
