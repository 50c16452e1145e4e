"""Merge coefficients learned by gradient descent on calibration samples: tensor l is theta0(l) + sum over experts i of
lambda_i,l tau_i,l, where tau_i is the task vector of expert i (AdaMerging, Yang et al. 2024,
https://arxiv.org/abs/2310.02575, section 3.2).

Only the coefficients change, by Adam. The gradient of a coefficient is the scalar product of its task vector and the
gradient of the loss with respect to the merged tensor. So one backward pass per task is enough for all experts.

Unlike in the paper, whose samples are those of the test sets without labels, the samples are those of calibration.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.data.batch_order import own_numbers, shuffled
from epmq_cli.data.batching import Batch, split
from epmq_cli.merge.method import Loss, MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Choice, Number, Parameters
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.ties import Options, majority_sign, sign_sum, trim_thresholds
from epmq_cli.runtime import distributed
from epmq_cli.runtime.progress import track

if TYPE_CHECKING:
    from torch import Tensor

Vectors = Callable[["Tensor", Mapping[str, "Tensor"]], Sequence["Tensor"]]
"""The task vectors of a tensor, from the base's tensor and the experts'."""


class TaskVectors:
    """The base's tensor and the task vectors (tasks, *shape) by name, on a device. Tensors stay in memory while all
    take at most `memory` bytes; others are read each time."""

    def __init__(self, source: MergeSource, vectors: Vectors, device: torch.device, memory: int) -> None:
        self._source, self._vectors, self._device, self._left = source, vectors, device, memory
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        if name in self._held:
            return self._held[name]
        base = self._source.base(name)
        tensors = base.to(self._device), torch.stack([*self._vectors(base, self._source.experts(name))])
        tensors = tensors[0], tensors[1].to(self._device)
        size = sum(tensor.nbytes for tensor in tensors)
        if size <= self._left:
            self._left -= size
            self._held[name] = tensors
        return tensors


def differences(base: Tensor, experts: Mapping[str, Tensor]) -> list[Tensor]:
    """The task vectors, one expert in memory at a time."""
    return [experts[task] - base for task in experts]


def agreeing(base: Tensor, experts: Mapping[str, Tensor], thresholds: Sequence[float], majority: float) -> list[Tensor]:
    """The task vectors after the first two steps of TIES: elements below an expert's threshold are 0, and so are those
    whose sign is not that of the sum over experts. `majority`: the sign where the sum is 0."""
    vectors = torch.stack(differences(base, experts))
    limits = torch.tensor(thresholds).view(-1, *[1] * base.ndim)
    trimmed = torch.where(vectors.abs() >= limits, vectors, 0.0)
    total = trimmed.sum(0)
    sign = torch.where(total == 0, majority, total.sign())
    return [*torch.where(trimmed.sign() == sign, trimmed, 0.0)]


@dataclass(frozen=True)
class LearnedCoefficients(Parameters):
    """A base of methods that learn coefficients; they differ in the loss.

    `coefficients`: one for each expert and tensor (`layer`, the paper's layer-wise) or one for each expert (`task`).
    `init`: their first value. `lr`, `steps`: Adam's learning rate, and its steps of one batch per task. `batch_size`:
    samples of a task in a step. `vectors`: `plain` task vectors, or those that TIES trims to `density` and whose signs
    it elects (`ties`, AdaMerging++). `seed`: the seed of the order of batches.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"batches", "gradients"})

    coefficients: Annotated[str, Choice(("layer", "task"))]
    init: Annotated[float, Number(0, 10)]
    lr: Annotated[float, Number(0, 1, open_low=True)]
    steps: Annotated[int, Number(0, 1_000_000, integer=True)]
    batch_size: Annotated[int, Number(1, 1 << 20, integer=True)]
    vectors: Annotated[str, Choice(("plain", "ties"))]
    density: Annotated[float, Number(0, 1, open_low=True)]
    seed: Annotated[int, Number(0, (1 << 31) - 1, integer=True)]

    @abstractmethod
    def losses(
        self, source: MergeSource, data: MergeData, parts: Mapping[str, Sequence[Batch]]
    ) -> Mapping[str, Sequence[Loss]]:
        """The loss of each batch of each task."""

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Learns the coefficients. Of several processes, each computes the gradients of its own batches; the steps are
        those of one process, up to rounding. Holds two sets of gradients, and the base and the task vectors up to the
        bytes of `data.memory`; further ones are read in every step."""
        assert data is not None
        vectors = self._vectors(source)
        learned = self._learned(source, data, TaskVectors(source, vectors, data.device, data.memory))
        rows = {name: row.float() for name, row in zip(source.names, learned, strict=True)}

        def merge(name: str, base: Tensor, experts: Mapping[str, Tensor]) -> Tensor:
            merged = base.clone()
            for coefficient, vector in zip(rows[name], vectors(base, experts), strict=True):
                merged += coefficient * vector
            return merged

        return TensorRule(merge)

    def _vectors(self, source: MergeSource) -> Vectors:
        """The task vectors of a tensor. For `ties`, reads all models three times to find thresholds and majority."""
        if self.vectors == "plain":
            return differences
        thresholds = trim_thresholds(source, self.density)
        options = Options(thresholds, [1.0] * len(thresholds))
        majority = majority_sign(source, lambda piece: sign_sum(piece.base, [*piece.experts.values()], options))
        return partial(agreeing, thresholds=thresholds, majority=majority)

    def _learned(self, source: MergeSource, data: MergeData, vectors: TaskVectors) -> Tensor:
        """The coefficients (tensors, tasks) in float64."""
        parts = {
            task: [p for batch in data.batches[task] for p in split(batch, self.batch_size)] for task in source.tasks
        }
        losses = self.losses(source, data, parts)
        rows = len(source.names) if self.coefficients == "layer" else 1
        own = torch.full((rows, len(parts)), float(self.init), dtype=torch.float64)
        adam = torch.optim.Adam([own], lr=self.lr)
        numbers = {
            task: own_numbers([len(split(batch, self.batch_size)) for batch in data.batches[task]]) for task in parts
        }
        order = cache(lambda task, epoch: shuffled(len(numbers[task]), self.seed, task, epoch))
        for step in track(range(self.steps), "learn the coefficients"):
            data.put(_merged(source, vectors, own))
            total: dict[str, Tensor] = {}
            for task, group in numbers.items():
                number = group[order(task, step // len(group))[step % len(group)]]
                if number is not None:
                    _add(total, data.gradients(task, parts[task][number], losses[task][number]))
            slopes = distributed.all_reduce(torch.stack([_slope(total, vectors, name) for name in source.names]))
            own.grad = slopes if self.coefficients == "layer" else slopes.sum(0, keepdim=True)
            adam.step()
        return own.expand(len(source.names), -1)


def _merged(source: MergeSource, vectors: TaskVectors, coefficients: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of the merged model, for coefficients (tensors, tasks) or (1, tasks)."""
    for name, row in zip(source.names, coefficients.expand(len(source.names), -1), strict=True):
        base, own = vectors[name]
        yield name, base + torch.tensordot(row.to(own), own, 1)


def _add(total: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    """Adds gradients to their sum, by tensor name."""
    for name, gradient in gradients.items():
        total[name] = total[name].add_(gradient) if name in total else gradient


def _slope(gradients: Mapping[str, Tensor], vectors: TaskVectors, name: str) -> Tensor:
    """The derivatives (tasks,) of the loss with respect to a tensor's coefficients; 0 for a tensor without gradient."""
    own = vectors[name][1]
    slope = own.reshape(len(own), -1) @ gradients[name].flatten() if name in gradients else own.new_zeros(len(own))
    return slope.double().cpu()
