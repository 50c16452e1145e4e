"""Oracles: GPTQ's result, from which it starts, and the best of all roundings."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.pipeline.job import make_job
from epmq_cli.quantize.autoround import AutoRound, auto_round
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight
from epmq_cli.quantize.gptq import gptq
from epmq_cli.quantize.quantizer import LayerProblem
from epmq_cli.quantize.rounding import RoundingOptions
from tests.helpers.formats import ints
from tests.helpers.hubs import config
from tests.quantize.test_gptq import problem

OPTIONS = RoundingOptions(0.01, 1, 0.002, (0.5, 1.1))


def start(W: Tensor, H: Tensor, format: NumberFormat) -> QuantizedWeight:
    found = gptq(W, H, format, "hessian", torch.float64, 0.001, 128, False).weight
    assert isinstance(found, QuantizedWeight)
    return found


def losses(weight: QuantizedWeight, W: Tensor, H: Tensor) -> Tensor:
    """tr (Q - W) H (Q - W)' by row."""
    error = weight.dequantize() - W
    return ((error @ H) * error).sum(1)


@pytest.mark.parametrize(("bits", "symmetric", "most"), [(2, True, 0.99), (3, False, 0.99), (4, True, 0.99)])
def test_no_row_loses_more_than_gptqs_and_all_together_lose_less(bits: int, symmetric: bool, most: float) -> None:
    W, H = problem(32, 32, bits)
    before = start(W, H, ints(bits, 16, symmetric))
    after = auto_round(before, W, H, OPTIONS, 200)
    assert (losses(after, W, H) <= losses(before, W, H) * (1 + 1e-12)).all()
    assert losses(after, W, H).sum() < most * losses(before, W, H).sum()
    assert after.codes.dtype == torch.int8


def test_with_fixed_scales_it_never_beats_the_best_of_all_roundings() -> None:
    W, H = problem(6, 5, 1)
    before = start(W, H, ints(2, -1, True))
    after = auto_round(before, W, H, RoundingOptions(0.01, 1, 0, (0.5, 1.1)), 200)
    choices = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float64)
    best = torch.full((6,), torch.inf, dtype=torch.float64)
    for row, scale in enumerate(before.grid.scale[:, 0]):
        error = choices * scale - W[row]
        best[row] = ((error @ H) * error).sum(1).min()
    assert torch.equal(after.grid.scale, before.grid.scale)
    assert (losses(after, W, H) >= best * (1 - 1e-9)).all()
    assert (losses(after, W, H) <= losses(before, W, H)).all()


def test_rows_are_independent() -> None:
    W, H = problem(8, 16, 2)
    quantizer = AutoRound(ints(3, 8, True), "hessian", 0.001, 128, False, 50, 0.01, 0.002, 1, [0.5, 1.1])
    layers = [LayerProblem(("x",), part.float(), part.float(), H, torch.float32) for part in (W, W[:3])]
    whole, part = (quantizer.quantize(layer, quantizer.prepare(H)).weight for layer in layers)
    assert isinstance(whole, QuantizedWeight)
    assert isinstance(part, QuantizedWeight)
    assert torch.equal(whole.codes[:3], part.codes)
    assert torch.equal(whole.grid.scale[:3], part.grid.scale)


def test_formats_that_are_no_integers_are_refused(clip_hub: Path) -> None:
    with pytest.raises(ConfigError, match=r"quant=autoround rounds to integers, got quant.format=fp8; use"):
        make_job(config(clip_hub, "quant=autoround", "quant.format=fp8", "bits=8"))
    with pytest.raises(ConfigError, match=r"quant.clip_range must be a list such as \[0.5, 1.1\], got \[1\]"):
        make_job(config(clip_hub, "quant=autoround", "quant.clip_range=[1]"))
