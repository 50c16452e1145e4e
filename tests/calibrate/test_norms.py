"""Oracles: the ridge problem of each channel written out, and closed forms; all in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from epmq_cli.calibrate.norms import NormObjective, normalised

WIDTH, TASKS = 8, 3


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Rms(nn.Module):
    """An RMS norm as in language models: a gain, no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(rand(WIDTH, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def layer_norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(rand(WIDTH, seed=1))
        norm.bias.copy_(rand(WIDTH, seed=2))
    return norm


def rms_norm() -> nn.RMSNorm:
    norm = nn.RMSNorm(WIDTH, eps=1e-6, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(rand(WIDTH, seed=5))
    return norm


def test_gain_and_bias_act_on_the_normalised_input() -> None:
    norm, x = layer_norm(), rand(5, WIDTH, seed=0)
    before = [parameter.clone() for parameter in norm.parameters()]
    torch.testing.assert_close(normalised(norm, x), (norm(x) - norm.bias) / norm.weight)
    assert all(torch.equal(own, kept) for own, kept in zip(norm.parameters(), before, strict=True))
    for rms in (Rms(), rms_norm()):
        torch.testing.assert_close(normalised(rms, x), rms(x) / rms.weight)


@pytest.mark.parametrize("norm", [layer_norm(), Rms(), rms_norm()], ids=["layer", "own rms", "rms"])
def test_one_expert_is_recovered_from_its_outputs_on_its_own_input(norm: nn.Module) -> None:
    """alpha = 1: the student has another gain and other inputs. Its normalised values are the teacher's up to scale
    and shift of the row."""
    taught = rand(20, WIDTH, seed=0)
    shift = 1.0 if isinstance(norm, nn.LayerNorm) else 0.0
    own = 3 * taught + shift
    biased = isinstance(norm, nn.LayerNorm)
    objective = NormObjective(rand(WIDTH, seed=6), rand(WIDTH, seed=7) if biased else None, 0.0)
    gain, bias = (dict(norm.named_parameters()).get(name) for name in ("weight", "bias"))
    assert gain is not None
    objective.add(normalised(norm, own), normalised(norm, taught), None, gain.detach(), bias)
    objective.close(1.0)
    found = objective.solve()
    torch.testing.assert_close(found[0], gain.detach(), rtol=1e-4, atol=1e-4)  # eps does not scale with the row
    assert (found[1] is None) is not biased
    if bias is not None:
        torch.testing.assert_close(found[1], bias.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_solution_minimises_the_written_out_objective(lam: float, biased: bool) -> None:
    gain, bias = rand(WIDTH, seed=1), rand(WIDTH, seed=2) if biased else None
    z, taught = ([rand(20 + t, WIDTH, seed=start + t) + 0.3 for t in range(TASKS)] for start in (10, 20))
    gains = [gain + rand(WIDTH, seed=30 + t) for t in range(TASKS)]
    biases = [rand(WIDTH, seed=40 + t) if biased else None for t in range(TASKS)]
    weights, factors = [rand(20 + t, seed=50 + t).abs() for t in range(TASKS)], (1.0, 2.0, 0.5)
    objective = NormObjective(gain, bias, lam)
    for t in range(TASKS):
        for half in (slice(0, 7), slice(7, None)):
            objective.add(z[t][half], taught[t][half], weights[t][half], gains[t], biases[t])
        objective.close(factors[t])
    found = [part.clone().requires_grad_() for part in objective.solve() if part is not None]
    total = lam * (found[0] - gain).square().sum()
    if bias is not None:
        total = total + lam * (found[1] - bias).square().sum()
    for t in range(TASKS):
        error = found[0] * z[t] - gains[t] * taught[t]
        given = biases[t]
        if given is not None:
            error = error + found[1] - given
        total = total + factors[t] / weights[t].sum() * (weights[t][:, None] * error.square()).sum()
    total.backward()  # type: ignore[no-untyped-call]
    for part in found:
        assert part.grad is not None
        assert part.grad.abs().max() < 1e-10


def test_one_expert_with_the_students_own_input_is_that_expert() -> None:
    z, gain, bias = rand(20, WIDTH, seed=0), rand(WIDTH, seed=1), rand(WIDTH, seed=2)
    objective = NormObjective(rand(WIDTH, seed=3), rand(WIDTH, seed=4), 0.0)
    objective.add(z, z, None, gain, bias)
    objective.close(1.0)
    found = objective.solve()
    torch.testing.assert_close(found[0], gain)
    torch.testing.assert_close(found[1], bias)


def test_a_strong_anchor_and_equal_experts_both_give_the_anchor() -> None:
    z, gain, bias = rand(20, WIDTH, seed=0), rand(WIDTH, seed=1), rand(WIDTH, seed=2)
    strong, equal = NormObjective(gain, bias, 1e9), NormObjective(gain, bias, 0.0)
    strong.add(z, z + 1, None, gain + 1, bias + 1)
    equal.add(z, z, None, gain, bias)
    for objective in (strong, equal):
        objective.close(1.0)
    torch.testing.assert_close(strong.solve(), (gain, bias), rtol=1e-6, atol=1e-6)
    assert torch.equal(equal.solve()[0], gain)
    assert torch.equal(equal.solve()[1], bias)  # type: ignore[arg-type]


def test_channels_without_a_unique_solution_keep_the_anchor() -> None:
    z, gain, bias = rand(20, WIDTH, seed=0), rand(WIDTH, seed=1), rand(WIDTH, seed=2)
    z[:, 3] = 1.5  # gain and bias of a constant channel are not identifiable
    objective = NormObjective(gain, bias, 0.0)
    objective.add(z, z, None, gain + 1, bias + 1)
    objective.close(1.0)
    found = objective.solve()
    assert found[0][3] == gain[3]
    torch.testing.assert_close(found[0][:3], gain[:3] + 1)


@pytest.mark.parametrize("biased", [True, False])
def test_the_anchor_stays_bit_for_bit_if_all_weights_are_zero(biased: bool) -> None:
    gain, bias = rand(WIDTH, seed=1), rand(WIDTH, seed=2) if biased else None
    objective = NormObjective(gain, bias, 0.0)
    objective.add(rand(20, WIDTH, seed=0), rand(20, WIDTH, seed=3), None, gain + 1, bias)
    objective.close(0.0)
    found = objective.solve()
    assert torch.equal(found[0], gain)
    assert found[1] is bias or torch.equal(found[1], bias)  # type: ignore[arg-type]


def test_a_dead_channel_of_a_norm_without_bias_keeps_the_anchor() -> None:
    z, gain = rand(20, WIDTH, seed=0), rand(WIDTH, seed=1)
    z[:, 3] = 0
    objective = NormObjective(gain, None, 0.0)
    objective.add(z, z, None, gain + 1, None)
    objective.close(1.0)
    found = objective.solve()[0]
    assert found[3] == gain[3]
    torch.testing.assert_close(found[4:], gain[4:] + 1)
