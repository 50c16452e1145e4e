"""Metrics of predictions, given the labels: at most 1, larger is better. Perplexity is in perplexity.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

PERPLEXITY = "perplexity"
CORRELATIONS = ("spearman", "pearson")
"""The metrics of numbers."""


class Score(NamedTuple):
    """A model's score on a task; a tuple, because progress and cache keep it as JSON.

    `error`: its standard error, as far as the choice of the test samples causes it; `samples`: the number of test
    samples, for perplexities of windows of tokens. None if they are not known.
    """

    value: float
    error: float | None = None
    samples: int | None = None


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The fraction of equal predictions and labels, both (samples,)."""
    return float((predictions == labels).double().mean())


def matthews(predictions: Tensor, labels: Tensor) -> float:
    """Matthews' correlation coefficient of classes (GLUE's metric for CoLA), in [-1, 1]."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels.numpy(), predictions.numpy()))


def spearman(predictions: Tensor, labels: Tensor) -> float:
    """Spearman's rank correlation of numbers (GLUE's metric for STS-B), in [-1, 1]; 0 if one of the two is
    constant."""
    if len(set(predictions.tolist())) < 2 or len(set(labels.tolist())) < 2:
        return 0.0
    from scipy.stats import spearmanr

    return float(spearmanr(predictions.double().numpy(), labels.double().numpy()).statistic)


def pearson(predictions: Tensor, labels: Tensor) -> float:
    """Pearson's correlation of numbers, in [-1, 1]; 0 if one of the two is constant."""
    if len(set(predictions.tolist())) < 2 or len(set(labels.tolist())) < 2:
        return 0.0
    from scipy.stats import pearsonr

    return float(pearsonr(predictions.double().numpy(), labels.double().numpy()).statistic)


MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "spearman": spearman,
    "pearson": pearson,
}


def average(scores: list[float], metric: str) -> float:
    """The mean over tasks; for perplexities the geometric mean, which is the exponential of the mean loss."""
    if metric == PERPLEXITY:
        return math.exp(sum(map(math.log, scores)) / len(scores))
    return sum(scores) / len(scores)


def average_error(scores: list[Score], metric: str) -> float | None:
    """The standard error of `average`, of tasks with samples of their own; None if that of a task is not known."""
    errors = [score.error for score in scores if score.error is not None]
    if len(errors) < len(scores):
        return None
    if metric == PERPLEXITY:
        relative = [error / score.value for error, score in zip(errors, scores, strict=True)]
        return average([score.value for score in scores], metric) * math.hypot(*relative) / len(scores)
    return math.hypot(*errors) / len(scores)
