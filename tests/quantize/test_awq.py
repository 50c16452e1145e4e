"""Oracles: the layer's outputs written out, the rounding method itself at alpha 0, brute force over clips; in
float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.awq import CLIPS, Awq, channel_scales, clipped, output_error, search_alpha
from epmq_cli.quantize.formats.format import by_group
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.gptq import Gptq
from epmq_cli.quantize.quantizer import InputStatistics, LayerProblem, Quantizer, Transform
from epmq_cli.quantize.rtn import Rtn, rtn

FORMAT = IntFormat(3, 8, "none")
OPTIONS: dict[str, Any] = {
    "format": FORMAT,
    "rounding": "rtn",
    "grid": "mse",
    "alpha": "auto",
    "candidates": 20,
    "clip": False,
    "damping": 0.001,
    "block_size": 128,
    "act_order": False,
}


def awq(**changes: Any) -> Awq:
    return Awq(**{**OPTIONS, **changes})


def inputs(tokens: int = 64, width: int = 16, seed: int = 0) -> Tensor:
    """Rows (tokens, width) in which two channels are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    found[:, [3, 9]] *= 30
    return found


def weights(rows: int = 24, width: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(X: Tensor) -> InputStatistics:
    return InputStatistics(X.T @ X, X.abs().mean(0), X.abs().amax(0))


def layer(W: Tensor, H: Tensor) -> LayerProblem:
    return LayerProblem(("it",), W, W, H, W.dtype)


def test_scales_are_powers_of_the_magnitude_around_1() -> None:
    magnitude = torch.tensor([0.0, 0.25, 1.0, 4.0], dtype=torch.float64)
    assert torch.equal(channel_scales(magnitude, 0), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(channel_scales(magnitude[1:], 0.5), torch.tensor([0.5, 1, 2]).double())
    assert float(channel_scales(magnitude, 1).prod()) > 0
    assert torch.equal(channel_scales(0 * magnitude, 0.5), torch.ones(4, dtype=torch.float64))


def test_the_output_error_is_that_of_the_outputs() -> None:
    X, W = inputs(), weights()
    error = rtn(W, FORMAT, "mse", W.dtype).dequantize() - W
    assert output_error(error, X.T @ X) == pytest.approx(float((X @ error.T).square().sum()))


def test_alpha_is_the_best_candidate() -> None:
    X, W = inputs(), weights()
    errors = {}
    for number in range(10):
        s = channel_scales(X.abs().mean(0), number / 10)
        outputs = (X / s) @ rtn(W * s, FORMAT, "minmax", W.dtype).dequantize().T
        errors[number / 10] = float((outputs - X @ W.T).square().sum())
    assert search_alpha(W, statistics(X), FORMAT, W.dtype, 10) == min(errors, key=errors.__getitem__) > 0


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_outlier_channels_lose_less_than_with_plain_rounding(rounding: str) -> None:
    before = after = 0.0
    for seed in range(4):
        X, W, quantizer = inputs(seed=seed), weights(seed=seed + 10), awq(rounding=rounding)
        s = quantizer.scales(W, statistics(X), W.dtype)
        assert s is not None
        for scales, folded in ((torch.ones_like(s), False), (s, True)):
            scaled, H = W * scales, (X / scales).T @ (X / scales)
            found = quantizer.quantize(layer(scaled, H), quantizer.prepare(H)).weight.dequantize()
            lost = float(((X / scales) @ (found - scaled).double().T).square().sum())
            after, before = (after + lost, before) if folded else (after, before + lost)
    assert after < (0.7 if rounding == "rtn" else 1) * before


@pytest.mark.parametrize("alpha", [0, "auto"])
def test_alpha_0_is_plain_rounding(alpha: object) -> None:
    X, W = inputs(), weights().float()
    H = X.T @ X
    for rounding, grid, plain in (
        ("rtn", "mse", Rtn(FORMAT, "mse")),
        ("gptq", "hessian", Gptq(FORMAT, "hessian", 0.001, 128, False)),
    ):
        quantizer = awq(rounding=rounding, grid=grid, alpha=alpha, candidates=1)
        assert quantizer.scales(W, statistics(X), torch.float32) is None
        found, wanted = (
            q.quantize(layer(W, H), q.prepare(H)).weight.dequantize()
            for q in (quantizer, plain)  # type: ignore[attr-defined]
        )
        assert torch.equal(found, wanted)


def test_it_needs_inputs_unless_it_is_plain_rtn() -> None:
    assert awq().needs == awq(alpha=0, clip=True).needs == awq(alpha=0, rounding="gptq", grid="mse").needs == {"inputs"}
    assert awq(alpha=0).needs == frozenset()
    assert isinstance(awq(), Transform)
    plain: Quantizer = Rtn(FORMAT, "mse")
    assert not isinstance(plain, Transform)


def test_each_group_is_clipped_to_the_least_error_of_its_outputs() -> None:
    X, W = inputs(), weights()
    W[:, 5] *= 4
    H, found = X.T @ X, by_group(clipped(weights_with_outlier(W), X.T @ X, FORMAT, W.dtype), FORMAT)
    groups = by_group(weights_with_outlier(W), FORMAT)
    for row in range(0, len(W), 6):
        for group in range(groups.shape[1]):
            own, block = groups[row, group], H[8 * group : 8 * group + 8, 8 * group : 8 * group + 8]
            tries = [own.clamp(-ratio * own.abs().max(), ratio * own.abs().max()) for ratio in CLIPS]
            lost = [clipping_error(own, one, block) for one in tries]
            assert clipping_error(own, found[row, group], block) == pytest.approx(min(lost))
    assert not torch.equal(found, groups)


def weights_with_outlier(W: Tensor) -> Tensor:
    found = W.clone()
    found[:, 12] *= 6
    return found


def clipping_error(group: Tensor, shrunk: Tensor, block: Tensor) -> float:
    rounded = rtn(shrunk[None], IntFormat(3, -1, "none"), "minmax", group.dtype).dequantize()[0]
    return float((rounded - group) @ block @ (rounded - group))


def test_clipping_lowers_the_error_of_rounding() -> None:
    X, W = inputs(), weights_with_outlier(weights())
    H = X.T @ X
    errors = [
        output_error(q.quantize(layer(W, H), q.prepare(H)).weight.dequantize() - W, H)
        for q in (awq(grid="minmax", clip=True), awq(grid="minmax"))
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounding": "hqq"}, "quant.rounding must be one of rtn, gptq, got 'hqq'"),
        ({"grid": "hessian"}, "quant.grid must be one of minmax, mse, got 'hessian'"),
        ({"alpha": 2}, r"quant.alpha must be a number in \[0, 1\], got 2"),
        ({"candidates": 0}, "quant.candidates"),
        ({"clip": 1.5}, "quant.clip"),
        ({"rounding": "gptq", "damping": 0}, "quant.damping"),
    ],
)
def test_bad_options_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        awq(**change)
