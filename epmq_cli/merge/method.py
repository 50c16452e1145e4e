"""The interface of merge methods: the data that a method reads, and the two kinds of rules that it returns.

A method is one module with a frozen dataclass, one YAML file in conf/merge and one test. Its `fit` may read the models
and, if `needs` is not empty, measure the experts on calibration data. The rule that it returns computes the merged
tensors one by one:

- an `ElementwiseRule` if each element depends only on the elements at its position. The engine cuts tensors into
  pieces that fit into the processor's cache, and merges the pieces in threads.
- a `TensorRule` if an element depends on the rest of its tensor, as in singular value decompositions. The rule gets
  whole tensors in their shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from epmq_cli.config.instantiate import option_name
from epmq_cli.data.batching import Batch
from epmq_cli.data.held_out import Subset
from epmq_cli.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from epmq_cli.merge.source import MergeSource

Need = Literal["batches", "gradients"]
"""The data that a method needs: calibration batches, and gradients of the experts' predictions on them."""


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
    returns the merged tensor. Each access to the mapping reads the expert's tensor again.

    `on_device`: whether the rule accepts tensors on an accelerator, where it is faster, as decompositions are.
    """

    merge: Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]
    on_device: bool = False


MergeRule = ElementwiseRule | TensorRule


@dataclass(frozen=True)
class PostRule:
    """Changes merged tensors: `apply` takes a tensor's name, the base's tensor, the experts' by task and the merged
    one, in float32, and returns the new one. `on_device`: as in `TensorRule`."""

    apply: Callable[[str, Tensor, Mapping[str, Tensor], Tensor], Tensor]
    on_device: bool = False


class PostProcessor(Protocol):
    """A post-processor of merged tensors; see `post.py`."""

    summary: ClassVar[str]
    """What it does, with its source, for `epmq list merge.post`."""

    def fit(self, source: MergeSource) -> PostRule:
        """The rule that changes the merged tensors."""


PieceReader = Callable[[], Piece]
"""Reads one piece in the calling thread."""

Loss = Callable[["Tensor", slice], "Tensor"]
"""The losses (samples,) of the logits (samples, classes) of some rows of a batch."""


Group = tuple[str, ...]
"""The names of linears that read the same inputs."""


class InputMoments(Protocol):
    """Returns moments of the inputs of some linears on a task."""

    def __call__(self, task: str, linears: Sequence[str], subset: Subset = "all") -> dict[str, Tensor]:
        """E[x x'] of the inputs x: (in, in) in float64, by name. For `fitted` and `held`, the part of it that is a sum
        over these samples; both together are that of `all`."""


Weights = Callable[[], Iterable[tuple[str, "Tensor"]]]
"""Returns names and tensors, each time it is called."""

MergeGroups = Callable[[Sequence[Group], InputMoments], dict[str, "Tensor"]]
"""Returns the merged weights of groups of linears, by tensor name."""


class MergeData(Protocol):
    """Calibration data: each expert with the samples of its own task."""

    @property
    def memory(self) -> int:
        """The bytes that a method's measurements may take."""

    @property
    def device(self) -> torch.device:
        """The model's device."""

    @property
    def batches(self) -> Mapping[str, Sequence[Batch]]:
        """Calibration batches by task. With several processes, each has its own part of them."""

    def expert(self, task: str) -> nn.Module:
        """The model with the weights of a task's expert; valid until the next call."""

    def put(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the model's weights, by name."""

    def logits(self, task: str, batch: Batch) -> Tensor:
        """The logits (samples, classes) of a task's head for a batch, with the model's current weights."""

    def gradients(self, task: str, batch: Batch, loss: Loss) -> dict[str, Tensor]:
        """The gradients of the mean loss of a batch with respect to the merged tensors, by name, at the model's current
        weights. Tensors without a gradient are left out."""

    def linear_groups(self) -> list[Group]:
        """The names of the merged linears; those in one group read the same inputs."""

    def input_moments(self, task: str, linears: Sequence[str], subset: Subset = "all") -> dict[str, Tensor]:
        """`InputMoments` in a task's expert, over the real tokens of all processes."""

    def merge_sections(self, start: Weights, merge: MergeGroups) -> dict[str, Tensor]:
        """Gives the model the tensors of `start`, and then replaces its linears by what `merge` returns, section by
        section; returns them by tensor name. After an out-of-memory error it starts again.

        The moments that `merge` gets are over the real tokens of all processes. The inputs of a section come from the
        merged sections in front of it, the activations inside from each expert's own section.
        """

    def squared_gradients(self, task: str, classes: int | None) -> dict[str, Tensor]:
        """The diagonal of a task's Fisher information, in float32, by tensor name: the mean over the samples of all
        processes of the expected square of the gradient of log p(class | sample) in the task's expert.

        The expectation is exact: over all classes, or over this number of the most likely ones of each sample. A head
        with one output is the mean of a Gaussian of variance 1. Tensors without a gradient are left out.
        """


class MergeMethod(Protocol):
    """A merge method, as `_target_` in conf/merge names it."""

    needs: ClassVar[frozenset[Need]]
    """Empty if the method reads only the models; `epmq merge` runs only such methods."""

    def check(self, tasks: Sequence[str]) -> None:
        """ConfigError if the options do not fit a suite with these tasks; called before any model is opened."""

    def fit(self, source: MergeSource, data: MergeData | None) -> MergeRule:
        """The rule that computes the merged tensors. `data` is None if `needs` is empty."""


def check_method(method: MergeMethod, tasks: Sequence[str]) -> None:
    """ConfigError if an object is not a merge method or does not fit a suite with these tasks."""
    lacking = [name for name in ("needs", "check", "fit") if not hasattr(method, name)]
    if lacking:
        kind = type(method)
        raise ConfigError(
            f"merge._target_ names {kind.__module__}.{kind.__qualname__}, which has no {', '.join(lacking)}; a merge "
            "method implements epmq_cli.merge.method.MergeMethod"
        )
    method.check(tasks)


def refuse_needs(method: MergeMethod) -> None:
    """ConfigError if a method needs data, which `epmq merge` does not read."""
    if method.needs:
        name = method_name(method)
        raise ConfigError(
            f"merge={name} needs calibration data, which epmq merge does not read; use epmq run merge={name} "
            "guidance=merged quant=none, which writes the merge unquantized"
        )


def method_name(method: MergeMethod) -> str:
    """The name of a method's option."""
    return option_name("merge", type(method))
