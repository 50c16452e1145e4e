"""Weights of experts: factors, 1 where none is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.merge.settings import Setting, TensorSetting, check_setting, check_tasks

LARGEST = 100


def check_weights(weights: Setting, negative: bool = False) -> None:
    """ConfigError if a weight is out of range."""
    if weights is not None:
        check_setting("merge.weights", weights, -LARGEST if negative else 0, LARGEST, by_task=True)


def check_weighted_tasks(weights: Setting, tasks: Sequence[str]) -> None:
    """ConfigError if weights name a task that the suite lacks, or are 0 for every task."""
    check_tasks("merge.weights", weights, tasks)
    if weights == 0 or (isinstance(weights, Mapping) and all(weights.get(task, 1) == 0 for task in tasks)):
        raise ConfigError("merge.weights must leave at least one task above 0, got 0 for every task")


def weighted(vectors: Mapping[str, Tensor], weights: TensorSetting, name: str) -> list[Tensor]:
    """The experts' tensors of a name, by task, each times its weight; the tensors themselves without weights."""
    if weights.setting is None:
        return list(vectors.values())
    return [weights.at(name, task) * vector for task, vector in vectors.items()]
