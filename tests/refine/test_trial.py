"""Oracle: the paired differences of held-out losses, written out with the statistics module."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from epmq_cli.refine.trial import CERTAIN, Trial

WEIGHTS = {"one": 1.0, "two": 3.0}


def rows(seed: int, shift: float = 0.0, noise: float = 1.0) -> dict[str, Tensor]:
    """Losses and agreements of 9 and 5 rows."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for task, count in (("one", 9), ("two", 5)):
        losses = 2 + noise * torch.rand(count, generator=generator, dtype=torch.float64) - shift
        found[task] = torch.stack([losses, (losses > 2).double()], 1)
    return found


def test_means_and_errors_are_those_of_paired_differences() -> None:
    first, later, trial = rows(0), rows(1, 0.5), Trial(0.1)
    assert trial.add(first, first, WEIGHTS)
    assert trial.add(later, first, WEIGHTS)
    loss = error = 0.0
    for task, weight in WEIGHTS.items():
        change = (later[task][:, 0] - first[task][:, 0]).tolist()
        loss += weight / 4 * statistics.mean(later[task][:, 0].tolist())
        error += (weight / 4) ** 2 * statistics.variance(change) / len(change)
    assert trial.losses[1] == pytest.approx(loss)
    assert trial.errors == pytest.approx([0, error**0.5])


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_a_gain_that_chance_explains_does_not_count(noise: float) -> None:
    first, trial = rows(0), Trial(0.1)
    trial.add(first, first, WEIGHTS)
    change = {task: torch.randn(len(own), generator=torch.Generator().manual_seed(3)) for task, own in first.items()}
    later = {task: own.clone() for task, own in first.items()}
    for task, own in later.items():
        own[:, 0] += noise * (change[task] - change[task].mean()) - 0.1
    trial.add(later, first, WEIGHTS)
    assert trial.losses[1] == pytest.approx(trial.losses[0] - 0.1)
    assert trial.best == 1
    assert trial.better == (CERTAIN * trial.errors[1] < 0.1) == (noise == 0)


def test_losses_that_are_not_finite_are_not_added() -> None:
    first, trial = rows(0), Trial(0.1)
    first["one"][0, 0] = float("nan")
    assert not trial.add(first, first, WEIGHTS)
    assert trial.losses == trial.agreements == trial.errors == []
