"""The last step of methods with sparse task vectors: adds them to the base, or elects signs as TIES does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.task_arithmetic import add_task_vectors
from epmq_cli.merge.ties import Options, elected

if TYPE_CHECKING:
    from torch import Tensor

Combine = Callable[[str, "Tensor", Sequence["Tensor"], Sequence[float]], "Tensor"]
"""Merges elements (n,) of a tensor: its name, the base, the sparse task vectors and their weights."""


def addition(source: MergeSource, scale: Setting) -> Combine:
    """Base plus `scale` times the sum of the task vectors."""
    scales = source.setting(scale, 1.0)

    def add(name: str, base: Tensor, vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        own = [weight * vector for weight, vector in zip(weights, vectors, strict=True)]
        return add_task_vectors(base, own, scales.at(name))

    return add


def election(source: MergeSource, scale: Setting, combine: str) -> Combine:
    """Base plus `scale` times the `sum` or the `mean` of the values that agree with the elected signs; the sign is +
    where the task vectors cancel. The mean divides by the sum of the values' weights."""
    scales = source.setting(scale, 1.0)

    def elect(name: str, base: Tensor, vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        options = Options([0.0] * len(vectors), weights, scale=scales.at(name), mean=combine == "mean")
        return base + elected(torch.zeros_like(base), vectors, options)

    return elect
