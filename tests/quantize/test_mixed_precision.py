"""Oracles: exhaustive search, the budget, and the actual loss of a quantizer."""

from __future__ import annotations

import itertools

import pytest
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.mixed_precision import MixedPrecision, Trial, allocate, formats_of
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import LayerProblem, nothing
from epmq_cli.quantize.rtn import Rtn
from tests.helpers.formats import ints

LOSSES = {"a": {3: 9.0, 4: 1.0}, "b": {3: 5.0, 4: 1.0}, "c": {3: 4.0, 4: 3.5}, "d": {3: 2.0, 4: 2.5}}
SIZES = {"a": 10, "b": 10, "c": 10, "d": 10}


def total(widths: dict[str, int]) -> float:
    return sum(LOSSES[group][width] for group, width in widths.items())


def average(widths: dict[str, int], sizes: dict[str, int]) -> float:
    return sum(widths[group] * size for group, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("budget", [3.0, 3.25, 3.3, 3.5, 3.75, 4.0])
def test_equal_sizes_get_the_best_of_all_allocations(budget: float) -> None:
    found = allocate(LOSSES, SIZES, budget)
    every = [dict(zip(LOSSES, widths, strict=True)) for widths in itertools.product((3, 4), repeat=4)]
    allowed = [widths for widths in every if average(widths, SIZES) <= budget + 1e-12]
    assert average(found, SIZES) <= budget + 1e-12
    assert total(found) == min(map(total, allowed))


@pytest.mark.parametrize("seed", range(20))
def test_unequal_sizes_stay_within_one_groups_gain_of_the_best(seed: int) -> None:
    """The guarantee of the greedy rule for the knapsack problem."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {str(i): int(torch.randint(1, 20, (), generator=generator)) for i in range(7)}
    high = {group: float(torch.rand((), generator=generator)) for group in sizes}
    gains = {group: float(torch.rand((), generator=generator)) - 0.1 for group in sizes}
    losses = {group: {2: high[group] + gains[group], 3: high[group]} for group in sizes}
    budget = 2 + float(torch.rand((), generator=generator))
    found = allocate(losses, sizes, budget)
    best = min(
        sum(losses[group][width] for group, width in zip(sizes, widths, strict=True))
        for widths in itertools.product((2, 3), repeat=len(sizes))
        if average(dict(zip(sizes, widths, strict=True)), sizes) <= budget + 1e-12
    )
    lost = sum(losses[group][width] for group, width in found.items())
    assert average(found, sizes) <= budget + 1e-9
    assert best - 1e-12 <= lost <= best + max(gains.values())


def test_a_budget_too_small_for_any_group_keeps_the_smaller_width() -> None:
    assert set(allocate(LOSSES, SIZES, 3.2).values()) == {3}
    assert allocate({"one": {4: 1.0, 8: 0.1}}, {"one": 5}, 7.9) == {"one": 4}


@pytest.mark.parametrize(("low", "high"), [(2, 3), (4, 8)])
def test_the_cost_of_a_group_is_the_difference_of_the_widths(low: int, high: int) -> None:
    losses = {group: {low: loss[3], high: loss[4]} for group, loss in LOSSES.items()}
    half = allocate(losses, SIZES, (low + high) / 2)
    assert half == {"a": high, "b": high, "c": low, "d": low}


def test_groups_are_ranked_by_gain_per_weight() -> None:
    losses = {"large": {3: 5.0, 4: 0.0}, "small": {3: 3.0, 4: 0.0}, "other": {3: 3.0, 4: 0.0}}
    found = allocate(losses, {"large": 20, "small": 10, "other": 10}, 3.5)
    assert found == {"large": 3, "small": 4, "other": 4}


def test_smaller_groups_use_the_budget_that_a_large_one_exceeds() -> None:
    sizes = {"a": 100, "b": 10, "c": 10, "d": 10}
    assert allocate({**LOSSES, "a": {3: 900.0, 4: 1.0}}, sizes, 3.2) == {"a": 3, "b": 4, "c": 4, "d": 3}


def test_no_group_gets_bits_that_increase_its_loss() -> None:
    assert allocate(LOSSES, SIZES, 4.0)["d"] == 3


def test_the_budget_holds_for_sizes_that_do_not_divide() -> None:
    sizes = {"a": 7, "b": 11, "c": 13, "d": 3}
    for budget in (3.1, 3.33, 3.5, 3.9):
        assert average(allocate(LOSSES, sizes, budget), sizes) <= budget + 1e-9


def test_a_trial_records_the_losses_of_each_width_and_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    inputs = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    H, mixed = inputs.T @ inputs, MixedPrecision(Rtn(ints(3, 4), "mse"), Rtn(Fp8Format(4), "mse"), 3.5)
    trial = Trial(mixed)
    layer = LayerProblem(("q",), weight, weight, H, torch.float32)
    outcome = trial.of("q").quantize(layer, trial.of("q").prepare(H))
    assert torch.equal(outcome.weight.dequantize(), weight)
    assert trial.sizes == {"q": 48}
    energy = (inputs @ weight.double().T).square().sum()
    for width, quantizer in ((3, mixed.low), (8, mixed.high)):
        rounded = quantizer.quantize(layer, nothing()).weight.dequantize()
        lost = (inputs @ (rounded - weight).double().T).square().sum() / energy
        assert trial.losses["q"][width] == pytest.approx(float(lost), rel=1e-9)
    trial.of("q").quantize(layer, nothing())
    assert trial.sizes == {"q": 96}
    assert trial.choose() == {"q": mixed.low}


def test_formats_are_all_possible_formats_of_a_linear() -> None:
    one, other = Rtn(ints(4, 64), "mse"), Rtn(Fp8Format(64), "mse")
    assert formats_of(MixedPrecision(one, other, 5)) == (ints(4, 64), Fp8Format(64))
    assert formats_of(other) == (Fp8Format(64),)
    assert formats_of(NoQuantizer()) == ()


@pytest.mark.parametrize("bits", [3.5, 4, 8, 9])
def test_bits_outside_the_two_formats_are_refused(bits: float) -> None:
    with pytest.raises(ConfigError, match="mixed precision needs bits between those of its two formats, got"):
        MixedPrecision(Rtn(ints(4, 64), "mse"), Rtn(Fp8Format(64), "mse"), bits)
