"""Oracles: brute force over zero points, round to nearest, and the stationarity of the closed forms; in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.errors import ConfigError
from epmq_cli.pipeline.job import Job, make_job
from epmq_cli.quantize.formats.format import Grid, fit_grid
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.hqq import Hqq, lp_error, shrink, solve_grid
from epmq_cli.quantize.quantizer import LayerProblem, nothing
from epmq_cli.quantize.rtn import rtn

P, DTYPE = 0.7, torch.float64
OPTIONS = (P, 10.0, 1.01, 20)


def weights_with_outliers(groups: int, columns: int = 16, seed: int = 0) -> Tensor:
    """Groups of weights with outliers."""
    generator = torch.Generator().manual_seed(seed)
    plain, spread = (torch.randn(groups, columns, generator=generator, dtype=DTYPE) for _ in range(2))
    return 0.02 * plain * spread.exp()


def total(groups: Tensor, grid: Grid, format: IntFormat) -> float:
    return float(lp_error(groups, grid, format, P).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_are_close_to_brute_force_and_better_than_the_start(bits: int) -> None:
    groups, format = weights_with_outliers(200), IntFormat(bits, -1, "real")
    start = fit_grid(groups, format, "minmax", DTYPE)
    found = solve_grid(groups, format, DTYPE, *OPTIONS, False)
    shifts = torch.linspace(-2, 2, 801, dtype=DTYPE)
    every = torch.stack([lp_error(groups, Grid(start.scale, start.zeros + shift), format, P) for shift in shifts])
    best, begun, ended = float(every.min(0).values.sum()), total(groups, start, format), total(groups, found, format)
    assert best <= ended * (1 + 1e-3)
    assert ended - best < 0.5 * (begun - best)


@pytest.mark.parametrize("kind", ["whole", "real"])
@pytest.mark.parametrize("solve_scale", [True, False])
def test_no_iteration_raises_the_error_of_a_group(kind: str, solve_scale: bool) -> None:
    groups, format = weights_with_outliers(50), IntFormat(3, -1, kind)  # type: ignore[arg-type]
    errors = [
        lp_error(groups, solve_grid(groups, format, DTYPE, P, 10.0, 1.01, count, solve_scale), format, P)
        for count in range(6)
    ]
    for before, after in pairwise(errors):
        assert (after <= before).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_real_zero_points_beat_integer_ones_and_both_beat_rtn(bits: int) -> None:
    groups = weights_with_outliers(200)
    real, whole = IntFormat(bits, -1, "real"), IntFormat(bits, -1, "whole")
    free = total(groups, solve_grid(groups, real, DTYPE, *OPTIONS, True), real)
    rounded = total(groups, solve_grid(groups, whole, DTYPE, *OPTIONS, True), whole)
    nearest = total(groups, rtn(groups, whole, "minmax", DTYPE).grid, whole)
    assert free < rounded < nearest


def test_without_iterations_it_is_rtn_over_the_full_range() -> None:
    weight = weights_with_outliers(8, 32).float()
    found = Hqq(4, 8, "integer", True, P, 10, 1.01, 0).quantize(problem(weight), nothing()).weight
    assert torch.equal(found.dequantize(), rtn(weight, IntFormat(4, 8, "whole"), "minmax", torch.float32).dequantize())


def problem(weight: Tensor) -> LayerProblem:
    return LayerProblem(("it",), weight, weight, None, torch.float32)


def test_integer_zero_points_are_codes_and_real_ones_are_not() -> None:
    weight = weights_with_outliers(8, 32).float()
    for kind, whole in (("integer", True), ("real", False)):
        found = Hqq(4, 8, kind, True, P, 10, 1.01, 20).quantize(problem(weight), nothing()).weight  # type: ignore[arg-type]
        zero = found.grid.zero  # type: ignore[union-attr]
        assert zero is not None
        assert torch.equal(zero, zero.round().clamp(-8, 7)) is whole


def test_one_outlier_does_not_change_the_scale_of_the_other_weights() -> None:
    codes = torch.tensor([[-4.0, -3, -1, 0, 1, 2, 3, 3.5]], dtype=DTYPE)  # 3.5 is an outlier for a grid with steps of 1
    format = IntFormat(3, -1, "whole")
    found = solve_grid(codes, format, DTYPE, *OPTIONS, True)
    assert float(fit_grid(codes, format, "minmax", DTYPE).scale) == pytest.approx(7.5 / 7)
    assert float(found.scale) == pytest.approx(1, rel=0.01)


def test_shrink_is_soft_thresholding_for_p_1_and_keeps_zero_at_zero() -> None:
    x = torch.tensor([-2.0, -0.05, 0.0, 0.05, 2.0])
    torch.testing.assert_close(shrink(x, 10, 1.0), torch.tensor([-1.9, 0.0, 0.0, 0.0, 1.9]))
    assert torch.equal(shrink(torch.zeros(3), 10, 0.7), torch.zeros(3))


def test_a_group_of_zeros_stays_zero() -> None:
    found = Hqq(4, 8, "real", True, P, 10, 1.01, 20).quantize(problem(torch.zeros(2, 16)), nothing()).weight
    assert not found.dequantize().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_point": "whole"}, "quant.zero_point must be one of integer, real, got 'whole'"),
        ({"lp_norm": 0}, r"quant.lp_norm must be a number in \(0, 1\], got 0"),
        ({"beta": -1}, "quant.beta"),
        ({"kappa": 0.5}, "quant.kappa"),
        ({"iterations": 1.5}, "quant.iterations must be a whole number"),
        ({"bits": 3.5}, "bits must be one of 2, 3, 4, 5, 6, 7, 8"),
    ],
)
def test_bad_options_are_refused(change: dict[str, object], message: str) -> None:
    good = {"bits": 4, "group_size": 64, "zero_point": "integer", "solve_scale": True}
    good |= {"lp_norm": 0.7, "beta": 10, "kappa": 1.01, "iterations": 20}
    with pytest.raises(ConfigError, match=message):
        Hqq(**{**good, **change})  # type: ignore[arg-type]


def test_real_zero_points_are_refused_if_the_checkpoint_cannot_store_them() -> None:
    def job(*overrides: str) -> Job:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return make_job(compose("run", overrides=["device=cpu", "out=unused", "quant=hqq", *overrides]))

    assert job().quantizer.format == IntFormat(4, 64, "whole")  # type: ignore[union-attr]
    assert job("quant.zero_point=real", "pack=dense").quantizer.format == IntFormat(4, 64, "real")  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="whole zero points.*; use quant.zero_point=integer or pack=dense"):
        job("quant.zero_point=real")
