"""Oracles: the loss of GPTQ's own loop, exhaustive candidates, and comparison with the squared-error search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epmq_cli.quantize.formats.format import Grid
from epmq_cli.quantize.gptq import gptq, inverse_factor
from epmq_cli.quantize.kernels.select import TorchKernel
from epmq_cli.quantize.scale_search import hessian_grid
from tests.helpers.formats import ints
from tests.helpers.tiers import every
from tests.quantize.test_gptq import loss as quadratic
from tests.quantize.test_gptq import problem

DAMPING = 1e-9
TORCH = TorchKernel()


def factor_of(H: Tensor) -> Tensor:
    found = inverse_factor(H, DAMPING)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("columns", [8, 20])
@pytest.mark.parametrize("symmetric", [True, False])
def test_loss_is_the_quadratic_form_that_gptq_ends_with(symmetric: bool, columns: int) -> None:
    W, H = problem(6, columns)
    format = ints(3, -1, symmetric)
    found = gptq(W, H, format, "mse", torch.float64, DAMPING, 128, False).weight
    grid = Grid(found.grid.scale.T, None if symmetric else found.grid.zeros.T)
    total = TORCH.loss(W, factor_of(H), grid, format)
    assert total.shape == (1, len(W))
    torch.testing.assert_close(float(total.sum()), quadratic(W, found.dequantize().double(), H), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_grid_is_never_worse_than_any_coarse_candidate(bits: int, symmetric: bool) -> None:
    W, H = problem()
    U, format = factor_of(H), ints(bits, -1, symmetric)
    found = hessian_grid(W, U, format, torch.float64, TORCH)
    best = TORCH.loss(W, U, Grid(found.scale.T, None if symmetric else found.zeros.T), format)[0]
    high = W.abs().amax(1) if symmetric else None
    for shrink in torch.linspace(0.25, 1, 16, dtype=torch.float64):
        for sign in (1, -1):
            if high is not None:
                scale = sign * shrink * 2 * high / (2**bits - 1)
                assert (best <= TORCH.loss(W, U, Grid(scale[None], None), format)[0] + 1e-9).all()


@pytest.mark.parametrize(
    ("bits", "gain", "act_order"),
    every(2, ((*case, act_order) for act_order in (False, True) for case in ((4, 0.95), (3, 0.9), (2, 0.85)))),
)
def test_it_loses_less_than_the_squared_error_search(bits: int, gain: float, act_order: bool) -> None:
    ratios = []
    for seed in range(6):
        W, H = problem(16, 32, seed)
        lost = []
        for search in ("hessian", "mse"):
            found = gptq(W, H, ints(bits, 16, True), search, torch.float64, 0.01, 128, act_order).weight
            lost.append(quadratic(W, found.dequantize().double(), H))
        ratios.append(lost[0] / lost[1])
    assert sum(ratios) / len(ratios) < gain


def test_rows_are_searched_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem()
    U, format = factor_of(H), ints(3, -1)
    whole = hessian_grid(W, U, format, torch.float64, TORCH)
    monkeypatch.setattr("epmq_cli.quantize.scale_search.CHUNK", 1)
    parts = hessian_grid(W, U, format, torch.float64, TORCH)
    assert torch.equal(whole.scale, parts.scale)


def test_a_row_of_zeros_has_a_grid() -> None:
    W, H = problem()
    W[2] = 0
    found = hessian_grid(W, factor_of(H), ints(4, -1), torch.float16, TORCH)
    assert torch.isfinite(found.scale).all()
    assert (found.scale != 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_searched_with_the_scales(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracles: the search of scales alone, and at 2 bits all pairs of a scale and a zero point."""
    W, H = problem(24, 16, bits)
    U, format = factor_of(H), ints(bits, -1, False)
    found = hessian_grid(W, U, format, torch.float64, TORCH)
    own = TORCH.loss(W, U, Grid(found.scale.T, found.zeros.T), format)[0]
    monkeypatch.setattr("epmq_cli.quantize.scale_search.FACTORS", ())
    monkeypatch.setattr("epmq_cli.quantize.scale_search.SHIFTS", ())
    scales = hessian_grid(W, U, format, torch.float64, TORCH)
    before = TORCH.loss(W, U, Grid(scales.scale.T, scales.zeros.T), format)[0]
    assert (own <= before).all()
    assert own.sum() < 0.99 * before.sum()
    assert torch.equal(found.zeros, found.zeros.round().clamp(format.lowest, format.highest))
    if bits == 2:
        span = (W.amax(1) - W.amin(1)) / 3
        pairs = [(span * k / 40, torch.full_like(span, z)) for k in range(8, 50) for z in range(-2, 2)]
        least = TORCH.loss(W, U, Grid(*map(torch.stack, zip(*pairs, strict=True))), format).amin(0)
        assert own.sum() < 1.05 * least.sum()
        assert before.sum() > 1.05 * least.sum()
