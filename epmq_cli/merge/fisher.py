"""Fisher merging: the mean of the experts, each element weighted by its Fisher information (Matena and Raffel 2022,
https://arxiv.org/abs/2111.09832, section 3, equation 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Number, Parameters, Weight
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


class WeightedMean:
    """The mean of tensors weighted element by element, one in memory at a time.

    It moves from value to value: `mean += weight / total * (value - mean)`. So equal values, or a single
    value, are returned unchanged.
    """

    def __init__(self) -> None:
        self.mean, self._total = torch.zeros(()), torch.zeros(())

    def add(self, value: Tensor, weight: Tensor) -> None:
        """Adds a tensor and its weights, which are non-negative and of the same shape, or a scalar."""
        self._total = self._total + weight
        share = torch.where(self._total > 0, weight / self._total, 0.0)
        self.mean = self.mean + share * (value - self.mean)


def importance_scale(fisher: Mapping[str, Tensor], normalize: bool) -> float:
    """1 / ||F||_2 over all tensors, so that experts with larger gradients do not count more; 1 unless `normalize`."""
    norm = sum(float(values.double().square().sum()) for values in fisher.values()) ** 0.5
    return 1 / norm if normalize and norm > 0 else 1.0


@dataclass(frozen=True)
class Fisher(Parameters):
    """`merge=fisher`.

    `floor`: added to each Fisher value, above 0; if all values are far below it, the result is the average.
    `normalize`: whether each expert's Fisher information is divided by its norm. `classes`: the number of most likely
    classes per sample that count, None for all. `weights`: factors by task, None for 1 each.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"batches", "gradients"})

    floor: Annotated[float, Number(0, 1, open_low=True)]
    normalize: bool
    classes: Annotated[int | None, Number(1, 1 << 30, integer=True, null=True)]
    weights: Annotated[Setting, Weight()]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Measures one expert after the other; holds the merged model and the sum of weights."""
        assert data is not None
        weights = source.setting(self.weights, 1.0)
        means = {name: WeightedMean() for name in source.names}
        for task in source.tasks:
            fisher = data.squared_gradients(task, self.classes)
            scale = importance_scale(fisher, self.normalize)
            for name, mean in means.items():
                values = fisher.pop(name, torch.zeros(())).cpu()  # without gradients, the floor makes it a mean
                mean.add(source.expert(task, name), weights.at(name, task) * scale * (values + self.floor))
        merged = {name: mean.mean for name, mean in means.items()}
        return TensorRule(lambda name, base, experts: merged[name])
