"""Weights of experts: factors by task, 1 for tasks that they do not name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from epmq_cli.config.validate import check_keys, check_range
from epmq_cli.errors import ConfigError

Weights = Mapping[str, float] | None
"""Factors by task such as {digits: 2}; None for 1 each."""

LARGEST = 100


def check_weights(weights: Weights, negative: bool = False) -> None:
    """ConfigError if a weight is out of range."""
    for task, weight in (weights or {}).items():
        check_range(f"merge.weights.{task}", weight, -LARGEST if negative else 0, LARGEST)


def check_weighted_tasks(weights: Weights, tasks: Sequence[str]) -> None:
    """ConfigError if weights name a task that the suite lacks, or are 0 for every task."""
    check_keys("merge.weights", weights or {}, tasks)
    if all(weight_of(weights, task) == 0 for task in tasks):
        raise ConfigError("merge.weights must leave at least one task above 0, got 0 for every task")


def weighted(vectors: Mapping[str, Tensor], weights: Weights) -> list[Tensor]:
    """Tensors of experts, by task, each times its weight; the tensors themselves without weights."""
    if weights is None:
        return list(vectors.values())
    return [weight_of(weights, task) * vector for task, vector in vectors.items()]


def weight_of(weights: Weights, task: str) -> float:
    """The weight of a task's expert."""
    return 1.0 if weights is None else weights.get(task, 1.0)
