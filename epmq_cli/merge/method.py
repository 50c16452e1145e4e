"""The interface of merge methods: what a method reads, and the two kinds of rules that it returns.

A method is one module with a frozen dataclass, one YAML file in conf/merge and one test. Its `fit` may read the models
and, where `needs` says so, measure the experts on calibration data. The rule that it returns then makes the merged
tensors one by one:

- an `ElementwiseRule` where each element depends on the elements at its place alone. The engine cuts tensors into
  pieces that fit into the processor's cache, and merges the pieces in threads.
- a `TensorRule` where an element depends on the rest of its tensor, as in singular value decompositions. The rule gets
  whole tensors in their shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from epmq_cli.data.batching import Batch
from epmq_cli.errors import ConfigError

if TYPE_CHECKING:
    from epmq_cli.merge.source import MergeSource

Need = Literal["batches", "gradients"]
"""What a method needs of the data: calibration batches, and gradients of what the experts predict on them."""


@dataclass(frozen=True)
class Piece:
    """A run of consecutive elements of one tensor, in the base and in every expert.

    `offset` is the index of the first element in the flattened tensor. `base` and each of `experts`, by task, are
    (elements,) in float32; rules must not change them in place.
    """

    name: str
    offset: int
    base: Tensor
    experts: Mapping[str, Tensor]

    def task_vectors(self) -> dict[str, Tensor]:
        """Expert minus base, by task."""
        return {task: expert - self.base for task, expert in self.experts.items()}

    def generator(self, seed: int, task: str = "") -> np.random.Generator:
        """Random numbers that depend on the seed, the task, the tensor's name and the offset alone: not on threads,
        devices, the order of tensors or the other experts."""
        key = hashlib.sha256(f"{seed}\n{task}\n{self.name}\n{self.offset}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


@dataclass(frozen=True)
class ElementwiseRule:
    """Merges tensors piece by piece: `merge` takes a piece and returns the merged elements (elements,)."""

    merge: Callable[[Piece], Tensor]


@dataclass(frozen=True)
class TensorRule:
    """Merges whole tensors: `merge` takes a tensor's name, the base's tensor and the experts' by task, in float32, and
    returns the merged tensor. An expert's tensor is read when the mapping is asked for it, every time."""

    merge: Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]


MergeRule = ElementwiseRule | TensorRule

PieceReader = Callable[[], Piece]
"""Reads one piece, in whichever thread calls it."""


class MergeData(Protocol):
    """Calibration data: each expert with the samples of its own task."""

    @property
    def memory(self) -> int:
        """Bytes that a method may hold of what it measures."""

    @property
    def batches(self) -> Mapping[str, Sequence[Batch]]:
        """Calibration batches by task. With several processes, each has its own part of them."""

    def expert(self, task: str) -> nn.Module:
        """The model with the weights of a task's expert, until the next call."""

    def logits(self, task: str, batch: Batch) -> Tensor:
        """What the head of a task makes of a batch, with the weights that the model has now: (samples, classes)."""

    def linear_groups(self) -> list[tuple[str, ...]]:
        """The names of the merged linears; those in one group read the same inputs."""

    def input_moments(self, task: str, linears: Sequence[str]) -> dict[str, Tensor]:
        """E[x x'] of the inputs x of some linears in a task's expert, over the real tokens of all processes: (in, in)
        in float64, by name."""

    def squared_gradients(self, task: str, classes: int | None) -> dict[str, Tensor]:
        """The diagonal of a task's Fisher information, in float32, by tensor name: the mean over the samples of all
        processes of the expected square of the gradient of log p(class | sample) in the task's expert.

        The expectation is exact: over all classes, or over so many of the most likely ones of each sample. A head with
        one output is the mean of a Gaussian of variance 1. Tensors without a gradient are left out.
        """


class MergeMethod(Protocol):
    """A merge method, as `_target_` in conf/merge names it."""

    needs: ClassVar[frozenset[Need]]
    """Empty where the method reads the models alone; `epmq merge` runs only these."""

    def check(self, tasks: Sequence[str]) -> None:
        """ConfigError where the options do not suit a suite with these tasks; called before any model is opened."""

    def fit(self, source: MergeSource, data: MergeData | None) -> MergeRule:
        """The rule that makes the merged tensors. `data` is None where `needs` is empty."""


def check_method(method: MergeMethod, tasks: Sequence[str]) -> None:
    """ConfigError where a method is none, or does not suit a suite with these tasks; before any model is opened."""
    lacking = [name for name in ("needs", "check", "fit") if not hasattr(method, name)]
    if lacking:
        kind = type(method)
        raise ConfigError(
            f"merge._target_ names {kind.__module__}.{kind.__qualname__}, which has no {', '.join(lacking)}; a merge "
            "method has what epmq_cli.merge.method.MergeMethod describes"
        )
    method.check(tasks)


def refuse_needs(method: MergeMethod) -> None:
    """ConfigError where a method needs data, which `epmq merge` does not read."""
    if method.needs:
        name = method_name(method)
        raise ConfigError(
            f"merge={name} needs calibration data, which epmq merge does not read; use epmq run merge={name} "
            "guidance=merged quant=none, which writes the merge unquantized"
        )


def method_name(method: MergeMethod) -> str:
    """The name of a method's module, which is that of its option."""
    return type(method).__module__.rpartition(".")[2]
