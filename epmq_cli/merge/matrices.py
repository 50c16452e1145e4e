"""What methods for matrices share: a rule that merges matrices by a function of their task vectors and other tensors by
the mean of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epmq_cli.merge.method import TensorRule
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor

TABLES = ("mean", "merge")
"""What to do with matrices over the vocabulary."""


@dataclass(frozen=True)
class TaskVectors(Mapping[str, "Tensor"]):
    """The task vectors of one tensor, by task. A task vector is computed each time it is looked up."""

    base: Tensor
    experts: Mapping[str, Tensor]

    def __getitem__(self, task: str) -> Tensor:
        return self.experts[task] - self.base

    def __iter__(self) -> Iterator[str]:
        return iter(self.experts)

    def __len__(self) -> int:
        return len(self.experts)

    def total(self) -> Tensor:
        """The sum of the task vectors, one in memory at a time."""
        total = torch.zeros_like(self.base)
        for task in self:
            total += self[task]
        return total


def matrix_rule(source: MergeSource, tables: str, scale: Setting, merge: Callable[[TaskVectors], Tensor]) -> TensorRule:
    """Base plus `scale` times `merge` of the task vectors for matrices, and times their mean for other tensors.

    `tables`: one of `TABLES`, for embeddings and output layers over the vocabulary, which are large.
    """
    averaged = {name for name in source.names if tables == "mean" and source.is_over_vocabulary(name)}
    scales = source.setting(scale, 1.0)

    def merged(name: str, base: Tensor, experts: Mapping[str, Tensor]) -> Tensor:
        vectors = TaskVectors(base, experts)
        is_matrix = base.ndim == 2 and name not in averaged
        return base + scales.at(name) * (merge(vectors) if is_matrix else vectors.total() / len(vectors))

    return TensorRule(merged, on_device=True)
