"""Metrics of predictions, given the labels: at most 1, larger is better. Perplexity is in perplexity.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PERPLEXITY = "perplexity"


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


MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "spearman": spearman,
}


def average(scores: list[float], metric: str) -> float:
    """The mean over tasks; for perplexities the geometric mean, which is the exponential of the mean loss."""
    if metric == PERPLEXITY:
        return math.exp(sum(map(math.log, scores)) / len(scores))
    return sum(scores) / len(scores)
