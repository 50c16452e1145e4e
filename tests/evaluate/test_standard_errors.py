"""Oracles: the scores of the same samples without one each, and of many other draws of samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from epmq_cli.evaluate.metrics import CORRELATIONS, MEASURES, matthews
from epmq_cli.evaluate.standard_errors import ERRORS, binomial, matthews_error, measured, perplexity_error

DRAWS, COUNT = 300, 200


def drawn(metric: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Predictions and labels that agree in part."""
    if metric in CORRELATIONS:
        labels = torch.randn(COUNT, generator=generator)
        return labels + torch.randn(COUNT, generator=generator), labels
    labels = torch.randint(0, 3, (COUNT,), generator=generator)
    right = torch.rand(COUNT, generator=generator) < 0.6
    return torch.where(right, labels, torch.randint(0, 3, (COUNT,), generator=generator)), labels


@pytest.mark.parametrize("metric", sorted(MEASURES))
def test_errors_are_the_spread_of_scores_over_draws_of_samples(metric: str) -> None:
    """300 draws tell a spread to within 4 %."""
    generator = torch.Generator().manual_seed(0)
    draws = [measured(metric, *drawn(metric, generator)) for _ in range(DRAWS)]
    errors = [score.error for score in draws if score.error is not None]
    assert np.mean(errors) == pytest.approx(np.std([score.value for score in draws], ddof=1), rel=0.12)
    assert {score.samples for score in draws} == {COUNT}


def test_the_error_of_matthews_is_that_of_the_jackknife() -> None:
    predictions, labels = torch.tensor([0, 1, 1, 2, 0, 1, 0]), torch.tensor([0, 1, 0, 2, 0, 1, 1])
    rest = [torch.arange(7) != index for index in range(7)]
    left = np.array([matthews(predictions[keep], labels[keep]) for keep in rest])
    wanted = math.sqrt(6 / 7 * float(((left - left.mean()) ** 2).sum()))
    assert matthews_error(predictions, labels) == pytest.approx(wanted)
    assert matthews_error(torch.zeros(7), torch.zeros(7)) == 0


def test_the_error_of_a_perplexity_is_the_spread_over_draws_of_windows() -> None:
    generator, found, errors = np.random.default_rng(0), [], []
    for _ in range(DRAWS):
        counts = generator.integers(5, 20, 100)
        sums = [float(generator.normal(2, 1, count).sum() + generator.normal()) for count in counts]
        found.append(math.exp(sum(sums) / counts.sum()))
        errors.append(perplexity_error(sums, counts.tolist()))
    assert np.mean([error for error in errors if error is not None]) == pytest.approx(np.std(found), rel=0.12)


def test_too_few_samples_have_no_error() -> None:
    one, three = torch.zeros(1), torch.arange(3.0)
    assert (ERRORS["matthews"](one, one), ERRORS["spearman"](three, three)) == (None, None)
    assert perplexity_error([1.0], [3]) is None
    assert (binomial(1.0, 5), binomial(1 + 1e-16, 5)) == (0, 0)
