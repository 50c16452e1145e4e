"""What a walk gives to the refinement of a quantized block, and gets back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from epmq_cli.calibrate.activations.hidden_state import HiddenState
from epmq_cli.calibrate.student import Student
from epmq_cli.data.batching import ALL, Batch, Batches, size, split
from epmq_cli.data.held_out import members
from epmq_cli.families.structure import Section
from epmq_cli.quantize.formats.format import QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BlockPart:
    """Samples of a batch: the student's hidden state in front of the block, the teacher's behind it, and which samples
    are held out (samples,)."""

    student: HiddenState
    teacher: HiddenState
    held: Tensor


@dataclass(frozen=True)
class BlockProblem:
    """A block whose linears are quantized.

    By the block's own names of its linears: `weights`, the `targets` that they approximate, and the `anchors`, all
    (out, in). `parts`: by task, the parts of each chunk of each batch (`Chunks`). `token`: the only token of the last
    block that heads read; None if all count alike.
    """

    block: Section
    student: Student
    weights: Mapping[str, QuantizedWeight]
    targets: Mapping[str, Tensor]
    anchors: Mapping[str, Tensor]
    parts: Mapping[str, Sequence[Sequence[Sequence[BlockPart]]]]
    token: int | None


@dataclass(frozen=True)
class BlockRecord:
    """The entry of a refined block in metrics.json: the relative errors of its output on the samples that are fitted
    and held out, before and after. `iteration`: the one whose result is kept, 0 for the block as it was."""

    name: str
    iteration: int
    error_before: float
    error: float
    held_out_before: float
    held_out: float


@dataclass(frozen=True)
class RefinedBlock:
    """The result of a refinement: the weights of the linears by the block's own names, and the record. Norms and biases
    are the student's."""

    weights: Mapping[str, QuantizedWeight]
    record: BlockRecord


class BlockRefiner(Protocol):
    """Refines a quantized block."""

    @property
    def batch_size(self) -> int:
        """The most samples of a chunk."""

    def refine(self, problem: BlockProblem) -> RefinedBlock:
        """Refines the block. Puts its new weights, norms and biases into the student."""


class Chunks:
    """Calibration batches in chunks of at most `most` samples, which go through a model in parts of at most `samples`
    samples.

    `whole`: the batches. `counts`: by task, the number of parts of each batch. `views`: the number of views of each
    sample, see `with_views`, which are held out together.
    """

    def __init__(self, batches: Batches, samples: int = ALL, most: int = ALL, views: int = 1) -> None:
        self.whole, self._samples, self._views = batches, samples, views
        self._chunks = {
            task: [[split(chunk, samples) for chunk in split(batch, most)] for batch in group]
            for task, group in batches.items()
        }
        self.counts = {task: [sum(map(len, batch)) for batch in group] for task, group in self._chunks.items()}

    def at_most(self, most: int) -> Chunks:
        """The same batches in smaller chunks."""
        return Chunks(self.whole, self._samples, most, self._views)

    def held(self, task: str) -> list[Tensor]:
        """Which samples (samples,) of each part of a task are held out."""
        masks = members("held", [size(batch) // self._views for batch in self.whole[task]])
        every = torch.cat([mask.repeat(self._views) for mask in masks if mask is not None])
        parts = [part for batch in self._chunks[task] for chunk in batch for part in chunk]
        return list(torch.split(every, [size(part) for part in parts]))

    def parts(self) -> dict[str, Sequence[Batch]]:
        """The parts of each task, one after the other."""
        return {
            task: [part for batch in group for chunk in batch for part in chunk] for task, group in self._chunks.items()
        }

    def paired(
        self, students: Mapping[str, Sequence[HiddenState]], teachers: Mapping[str, Sequence[HiddenState]]
    ) -> dict[str, list[list[list[BlockPart]]]]:
        """The parts of each chunk of each batch of each task, with the hidden states of student and teacher."""
        return {
            task: list(self._paired(task, zip(students[task], teachers[task], strict=True))) for task in self._chunks
        }

    def _paired(self, task: str, states: Iterator[tuple[HiddenState, HiddenState]]) -> Iterator[list[list[BlockPart]]]:
        held = iter(self.held(task))
        for batch in self._chunks[task]:
            yield [[BlockPart(*next(states), next(held)) for _ in chunk] for chunk in batch]
