"""The refinement of a walk's quantized blocks: collects what the refiner reads, and takes over its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from epmq_cli.calibrate.activations.hidden_state import HiddenState
from epmq_cli.calibrate.block_refinement import BlockProblem, BlockRefiner, Chunks
from epmq_cli.calibrate.progress import WalkResult
from epmq_cli.calibrate.solve_layer import SolvedLinear
from epmq_cli.calibrate.student import Student
from epmq_cli.families.structure import Section
from epmq_cli.quantize.formats.format import QuantizedWeight

Streams = Mapping[str, Sequence[HiddenState]]


class BlockRefinement:
    """Refines the blocks of a walk one after the other. In memory are the anchors and targets of one block."""

    def __init__(self, refiner: BlockRefiner, student: Student, chunks: Chunks) -> None:
        self._refiner, self._student, self._chunks = refiner, student, chunks
        self._anchors: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}

    def keep_anchors(self, block: Section, local: Sequence[str]) -> None:
        """Keeps the anchors of linears that are not solved yet, by the block's own names."""
        self._anchors |= {name: self._student.anchor(f"{block.name(name)}.weight") for name in local}

    def keep_targets(self, local: Sequence[str], solutions: Sequence[SolvedLinear]) -> None:
        """Keeps the targets of linears."""
        self._targets |= {name: own.target.float().clone() for name, own in zip(local, solutions, strict=True)}

    def run(self, block: Section, token: int | None, students: Streams, teachers: Streams, result: WalkResult) -> None:
        """Refines a block whose linears are quantized; the result receives its new weights and its record.

        `students`: in front of the block or waiting in it; afterwards they start at its input again. `teachers`: behind
        the teacher's block.
        """
        for stream in (stream for streams in students.values() for stream in streams):
            stream.rewind()
        found = {name: result.weights[block.name(name)] for name in self._targets}
        weights = {name: weight for name, weight in found.items() if isinstance(weight, QuantizedWeight)}
        parts = self._chunks.paired(students, teachers)
        refined = self._refiner.refine(
            BlockProblem(block, self._student, weights, self._targets, self._anchors, parts, token)
        )
        for name, weight in refined.weights.items():
            result.weights.add(block.name(name), weight)
        result.blocks.append(refined.record)
        self._targets, self._anchors = {}, {}
