"""Standard errors of metrics: how much scores vary with the choice of the test samples.

Samples count as independent. Models that are scored on the same samples differ by less than their errors suggest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from epmq_cli.evaluate.metrics import MEASURES, Score, accuracy, pearson, spearman

if TYPE_CHECKING:
    from torch import Tensor

Error = Callable[["Tensor", "Tensor"], float | None]
"""Of predictions and labels (samples,); None for too few samples."""


def binomial(share: float, count: int) -> float:
    """The standard error of a share of so many samples."""
    return math.sqrt(max(0.0, share * (1 - share)) / count)


def accuracy_error(predictions: Tensor, labels: Tensor) -> float:
    """That of the share of right predictions."""
    return binomial(accuracy(predictions, labels), len(labels))


def matthews_error(predictions: Tensor, labels: Tensor) -> float | None:
    """That of Matthews' correlation, by the jackknife: from the coefficients without one sample each."""
    names, codes = np.unique(np.concatenate([predictions.numpy(), labels.numpy()]), return_inverse=True)
    said, right = np.split(codes, 2)
    count = len(said)
    if count < 2:
        return None
    predicted, true = (np.bincount(part, minlength=len(names)).astype(float) for part in (said, right))
    same = (said == right).astype(float)
    # sums over classes, without the sample that is left out
    products = predicted @ true - true[said] - predicted[right] + same
    squares = predicted @ predicted - 2 * predicted[said] + 1, true @ true - 2 * true[right] + 1
    rest = (count - 1.0) ** 2
    scale = np.sqrt(np.maximum(rest - squares[0], 0) * np.maximum(rest - squares[1], 0))
    cover = (same.sum() - same) * (count - 1) - products
    left = np.divide(cover, scale, out=np.zeros(count), where=scale > 0)
    return math.sqrt((count - 1) / count * float(np.square(left - left.mean()).sum()))


def spearman_error(predictions: Tensor, labels: Tensor) -> float | None:
    """That of Spearman's correlation r, (1 - r^2) sqrt((1 + r^2 / 2) / (n - 3)), after Bonett and Wright (2000,
    https://doi.org/10.1007/BF02294183), who give it for Fisher's transform of r."""
    if len(labels) < 4:
        return None
    squared = spearman(predictions, labels) ** 2
    return (1 - squared) * math.sqrt((1 + squared / 2) / (len(labels) - 3))


def pearson_error(predictions: Tensor, labels: Tensor) -> float | None:
    """That of Pearson's correlation r, (1 - r^2) / sqrt(n - 3), by Fisher's transform."""
    if len(labels) < 4:
        return None
    return (1 - pearson(predictions, labels) ** 2) / math.sqrt(len(labels) - 3)


def perplexity_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """That of exp(sum of losses / number of tokens), by the delta method. `sums`, `counts`: of the losses of each
    window. Windows of one text are alike, which this ignores."""
    losses, tokens = np.array(sums, dtype=float), np.array(counts, dtype=float)
    if len(losses) < 2:
        return None
    mean = losses.sum() / tokens.sum()
    spread = np.square(losses - mean * tokens).sum() * len(losses) / (len(losses) - 1)
    error = math.exp(mean) * math.sqrt(spread) / tokens.sum()
    return float(error)


ERRORS: dict[str, Error] = {
    "accuracy": accuracy_error,
    "matthews": matthews_error,
    "spearman": spearman_error,
    "pearson": pearson_error,
}
"""By metric."""


def measured(metric: str, predictions: Tensor, labels: Tensor) -> Score:
    """The value of a metric with its standard error."""
    return Score(MEASURES[metric](predictions, labels), ERRORS[metric](predictions, labels), len(labels))
