"""Oracles: the actual loss of a quantizer, and the limit of bits or bytes."""

from __future__ import annotations

import pytest
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.gptq import Gptq
from epmq_cli.quantize.mixed_precision import Candidate, MixedPrecision, Sizes, Trial, formats_of
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import LayerProblem, nothing
from epmq_cli.quantize.rtn import Rtn
from tests.helpers.formats import ints

LOSSES = {"a": [9.0, 1.0], "b": [5.0, 1.0], "c": [4.0, 3.5], "d": [2.0, 2.5]}
THREE_FOUR = tuple(Rtn(ints(bits, 4), "mse") for bits in (3, 4))


def chosen(bits: float, weights: dict[str, int], losses: dict[str, list[float]] = LOSSES) -> dict[str, int]:
    """The bits of each group after a trial of 3 and 4 bits with these losses."""
    found = Trial(MixedPrecision(THREE_FOUR, bits), losses, weights).choose()
    return {group: 3 + index for group, index in found.items()}


def test_groups_get_bits_by_their_gain_per_weight() -> None:
    assert chosen(3.5, dict.fromkeys(LOSSES, 10)) == {"a": 4, "b": 4, "c": 3, "d": 3}
    losses = {"large": [5.0, 0.0], "small": [3.0, 0.0], "other": [3.0, 0.0]}
    assert chosen(3.5, {"large": 20, "small": 10, "other": 10}, losses) == {"large": 3, "small": 4, "other": 4}


def test_no_group_gets_bits_that_increase_its_loss() -> None:
    assert chosen(3.99, dict.fromkeys(LOSSES, 10))["d"] == 3


def test_an_average_too_small_for_any_group_keeps_the_smaller_width() -> None:
    assert {*chosen(3.2, dict.fromkeys(LOSSES, 10)).values()} == {3}


@pytest.mark.parametrize("bits", [3.1, 3.33, 3.5, 3.9])
def test_the_average_holds_for_sizes_that_do_not_divide(bits: float) -> None:
    weights = {"a": 7, "b": 11, "c": 13, "d": 3}
    found = chosen(bits, weights)
    assert sum(found[group] * count for group, count in weights.items()) <= bits * sum(weights.values()) + 1e-9


def test_a_budget_limits_the_bytes() -> None:
    """Of 100 bytes 60 are no weights of linears; `a` gains more than `b`, and 4 bytes are left for neither."""
    mixed = MixedPrecision(THREE_FOUR, budget=100, sizes=Sizes(60, {"a": (10, 20), "b": (10, 20)}))
    assert (mixed.sizes.smallest, mixed.sizes.largest) == (80, 100)  # type: ignore[union-attr]
    losses, weights = {group: LOSSES[group] for group in "ab"}, {"a": 8, "b": 8}
    assert Trial(mixed, losses, weights).choose() == {"a": 1, "b": 1}
    trial = Trial(MixedPrecision(THREE_FOUR, budget=94, sizes=mixed.sizes), losses, weights)
    assert trial.choose() == {"a": 1, "b": 0}
    table = trial.sensitivities(trial.choose(), {"a": "a", "k": "a", "b": "b"})
    assert [(entry.linears, entry.weights, entry.chosen) for entry in table] == [
        (["a", "k"], 8, "int4"),
        (["b"], 8, "int3"),
    ]
    assert table[0].candidates == [Candidate("int3", 4, 9.0, 10), Candidate("int4", 4, 1.0, 20)]


def test_a_trial_records_the_losses_of_each_width_and_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    inputs = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    H, mixed = inputs.T @ inputs, MixedPrecision((Rtn(ints(3, 4), "mse"), Rtn(Fp8Format(4), "mse")), 3.5)
    trial = Trial(mixed)
    layer = LayerProblem(("q",), weight, weight, H, torch.float32)
    outcome = trial.of("q").quantize(layer, trial.of("q").prepare(H))
    assert torch.equal(outcome.weight.dequantize(), weight)
    assert trial.weights == {"q": 48}
    energy = (inputs @ weight.double().T).square().sum()
    for index, quantizer in enumerate(mixed.quantizers):
        rounded = quantizer.quantize(layer, nothing()).weight.dequantize()
        lost = (inputs @ (rounded - weight).double().T).square().sum() / energy
        assert trial.losses["q"][index] == pytest.approx(float(lost), rel=1e-9)
    trial.of("q").quantize(layer, nothing())
    assert trial.weights == {"q": 96}
    assert trial.choose() == {"q": 0}


def test_the_losses_of_several_group_sizes_are_those_of_each_quantizer_alone() -> None:
    """With act-order what GPTQ prepares depends on the group size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator)
    inputs = torch.randn(40, 16, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 16)
    H = inputs.T @ inputs
    quantizers = tuple(Gptq(ints(bits, size), "mse", 0.01, 128, True) for bits in (3, 4) for size in (16, 4, 8))
    trial = Trial(MixedPrecision(quantizers, budget=100))
    layer = LayerProblem(("q",), weight, weight, H, torch.float32)
    trial.of("q").quantize(layer, trial.of("q").prepare(H))
    energy = (inputs @ weight.double().T).square().sum()
    for quantizer, loss in zip(quantizers, trial.losses["q"], strict=True):
        rounded = quantizer.quantize(layer, quantizer.prepare(H)).weight.dequantize()
        assert loss == pytest.approx(float((inputs @ (rounded - weight).double().T).square().sum() / energy), rel=1e-9)
    chosen = trial.sensitivities({"q": 4}, {"q": "q"})[0]
    assert (chosen.chosen, chosen.group_size) == ("int4", 4)


def test_losses_are_weighed_by_the_divergence_for_each_loss() -> None:
    """`a` has the larger losses, but an error of 0.5 in it changes the outputs by 0.1, in `b` by 4."""
    losses, weights = {"a": [9.0, 1.0], "b": [5.0, 1.0], "c": [0.0, 0.0]}, dict.fromkeys("abc", 10)
    trial = Trial(MixedPrecision(THREE_FOUR, 3.4), losses, weights, {"a": 0.5, "b": 0.5, "c": 0.0})
    assert trial.choose() == {"a": 1, "b": 0, "c": 0}
    trial.weigh({"a": 0.1, "b": 4.0, "c": 0.0})
    assert trial.losses == {"a": pytest.approx([1.8, 0.2]), "b": pytest.approx([40.0, 8.0]), "c": [0.0, 0.0]}
    assert trial.choose() == {"a": 0, "b": 1, "c": 0}


def test_the_probe_is_the_loss_of_the_first_format_rounded_to_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator).double()
    trial = Trial(MixedPrecision(THREE_FOUR, 3.5, divergence=lambda: lambda: 0.0))
    layer = LayerProblem(("q",), weight, weight, inputs.T @ inputs, torch.float32)
    trial.of("q").quantize(layer, nothing())
    assert trial.probes["q"] == pytest.approx(trial.losses["q"][0], rel=1e-12)
    other = Trial(trial.mixed)
    other.restore(trial.state())
    assert other == trial


def test_formats_are_all_possible_formats_of_a_linear() -> None:
    one, other = Rtn(ints(4, 64), "mse"), Rtn(Fp8Format(64), "mse")
    assert formats_of(MixedPrecision((one, other), 5)) == (ints(4, 64), Fp8Format(64))
    assert formats_of(other) == (Fp8Format(64),)
    assert formats_of(NoQuantizer()) == ()


@pytest.mark.parametrize("bits", [3.5, 4, 8, 9])
def test_bits_outside_the_two_formats_are_refused(bits: float) -> None:
    with pytest.raises(ConfigError, match="mixed precision needs bits between those of its formats, got"):
        MixedPrecision((Rtn(ints(4, 64), "mse"), Rtn(Fp8Format(64), "mse")), bits)
