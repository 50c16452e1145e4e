"""Oracles: equation 4 of the paper, the same outputs without rounding, and inputs rounded in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.quantizer import InputStatistics, LayerProblem, Transform
from epmq_cli.quantize.smoothquant import SmoothQuant, smoothing_scales
from tests.helpers.hubs import walk

W8A8 = IntFormat(8, -1, "none", "int8")
OPTIONS: dict[str, Any] = {
    "format": W8A8,
    "rounding": "rtn",
    "grid": "minmax",
    "alpha": 0.5,
    "damping": 0.001,
    "block_size": 128,
    "act_order": False,
}


def smoothquant(**changes: Any) -> SmoothQuant:
    return SmoothQuant(**{**OPTIONS, **changes})


def rounded(x: Tensor) -> Tensor:
    """8 bits with a scale a row."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_scales_are_those_of_the_paper_up_to_one_factor(alpha: float) -> None:
    x, w = (torch.rand(6, generator=torch.Generator().manual_seed(seed)) + 0.1 for seed in (0, 1))
    found = smoothing_scales(x, w, alpha)
    wanted = x.double() ** alpha / w.double() ** (1 - alpha)
    torch.testing.assert_close(found / found[0], wanted / wanted[0])
    assert float(found.max() * found.min()) == pytest.approx(1)


def test_dead_channels_have_finite_scales() -> None:
    x, w = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])
    assert all(smoothing_scales(a, b, 0.5).isfinite().all() for a, b in ((x, w), (0 * x, w), (x, 0 * w)))
    assert (smoothing_scales(x, w, 0.5) > 0).all()


def test_outliers_of_inputs_lose_less() -> None:
    generator = torch.Generator().manual_seed(0)
    X, W = (torch.randn(rows, 16, generator=generator, dtype=torch.float64) for rows in (64, 24))
    X[:, 3] *= 100
    quantizer = smoothquant()
    statistics = InputStatistics(X.T @ X, X.abs().mean(0), X.abs().amax(0))
    s = quantizer.scales(W, statistics, W.dtype)
    assert isinstance(quantizer, Transform)
    assert s is not None
    errors = []
    for scales in (torch.ones_like(s), s):
        H = (X / scales).T @ (X / scales)
        layer = LayerProblem(("it",), W * scales, W * scales, H, W.dtype)
        Q = quantizer.quantize(layer, quantizer.prepare(H)).weight.dequantize()
        torch.testing.assert_close((X / scales) @ (W * scales).T, X @ W.T)
        errors.append(float((rounded(X / scales) @ Q.T - X @ W.T).square().sum()))
    assert errors[1] < 0.25 * errors[0]


def test_ranges_of_inputs_are_evened_in_a_walk(clip_hub: Path) -> None:
    options = ("guidance=merged", "quant.format=w8a8", "bits=8", "group_size=-1")
    plain, smooth = (walk(clip_hub, f"quant={quant}", *options) for quant in ("rtn", "smoothquant"))
    norm = "vision_model.encoder.layers.0.layer_norm2.weight"
    one, other = (found.student.get_parameter(norm) for found in (plain, smooth))
    assert not torch.equal(one, other)
    torch.testing.assert_close(smooth.features(smooth.student), plain.features(plain.student), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": IntFormat(4, 8, "none")}, "round the inputs of linears, such as w8a8, got quant.format=int4; use"),
        ({"alpha": 2}, r"quant.alpha must be a number in \[0, 1\], got 2"),
        ({"rounding": "hqq"}, "quant.rounding must be one of rtn, gptq, got 'hqq'"),
    ],
)
def test_bad_options_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        smoothquant(**change)
