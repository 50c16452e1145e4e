"""Walks through the student section by section, and calibrates and quantizes each group of linears.

The student's inputs always come through the quantized prefix. Inside a block the steps follow the forward pass, and
each reads the outputs of the quantized steps before it ("true sequential"): the forward pass of every batch pauses in
front of a step until the step is solved. If guidance needs them, the walk also computes each expert's own activations
of the same samples, with one block of one expert in memory at a time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice

from torch import Tensor, nn

from epmq_cli.calibrate.activations.capture import CaptureSpec, LayerInputs
from epmq_cli.calibrate.activations.hidden_state import HiddenState, enter, handed, inputs
from epmq_cli.calibrate.activations.pausable_forward import pause_hooks
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.block_refinement import BlockRefiner, Chunks
from epmq_cli.calibrate.embeddings import solve_stem
from epmq_cli.calibrate.fold import fold_block
from epmq_cli.calibrate.moments import real_tokens
from epmq_cli.calibrate.norms import has_gain
from epmq_cli.calibrate.progress import WalkProgress, WalkResult
from epmq_cli.calibrate.refine_block import BlockRefinement
from epmq_cli.calibrate.solve_layer import quantize_anchor, solve
from epmq_cli.calibrate.solve_norm import solve_norm
from epmq_cli.calibrate.student import Student
from epmq_cli.calibrate.task_moments import measure_objective
from epmq_cli.calibrate.teacher_blocks import TeacherBlocks
from epmq_cli.calibrate.walk_parts import walk_parts
from epmq_cli.calibrate.weight_sink import WeightSink
from epmq_cli.data.batching import Batch, device_of
from epmq_cli.families.structure import Linears, Norm, Section, Stack
from epmq_cli.models.weights import swapped_weights
from epmq_cli.quantize.kernels.select import load_kernels
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import Quantizer
from epmq_cli.runtime.block_offload import on_device
from epmq_cli.runtime.progress import bar

QuantizerOf = Callable[[Sequence[str]], Quantizer]
"""Returns the quantizer of the linears with these names, which read the same input."""


class Walk:
    """One walk through the student, stack by stack. Calibrates it and quantizes the linears of its blocks; the results
    replace its tensors.

    `chunks`: calibration batches of each task, on the student's device; the results do not depend on the size of the
    parts that run through the model. `store` offloads activations; in memory by default. `progress` stores finished
    sections; none by default. `refiner`: refines every block after its linears are quantized; none by default.
    """

    def __init__(
        self,
        student: Student,
        chunks: Chunks,
        quantizer_of: QuantizerOf,
        store: ActivationStore | None = None,
        progress: WalkProgress | None = None,
        refiner: BlockRefiner | None = None,
    ) -> None:
        self.student, self.quantizer_of = student, quantizer_of
        self.store, self.progress = store or ActivationStore(math.inf), progress or WalkProgress()
        self.result = WalkResult(WeightSink(), [])
        self.family, self.guidance = student.family, student.guidance
        self.stacks = self.family.stacks(student.model)
        self.measures = self.guidance.needs_inputs or self._quantizers_need_inputs()
        self.taught = self.guidance.teaches or refiner is not None
        self.chunks, self.refinement = chunks, BlockRefinement(refiner, student, chunks) if refiner else None
        self.own = self.others = chunks.parts()  # the inputs of the present stack, for the student and for the teachers
        self.streams: dict[str, list[HiddenState]] = {}
        self.teacher_streams: dict[str, list[HiddenState]] = {}
        self.blocks = TeacherBlocks(student.reference, self.store)

    def run(self) -> WalkResult:
        """Solves every section in order. Finished sections are restored, and batches run through them unsolved."""
        steps = [(stack, section) for stack in self.stacks for section in stack.sections]
        entries = [_entries(number, section is stack.blocks[0]) for number, (stack, section) in enumerate(steps)]
        if self.progress.restore_all([name for names in entries for name in names], self.student, self.result):
            return self.result
        solves = [section is not stack.readout or self.guidance.readout for stack, section in steps]
        finished = [entry in self.progress.entries for entry, *_ in entries]
        parts = walk_parts(self.stacks, [solve and not done for solve, done in zip(solves, finished, strict=True)])
        load_kernels(device_of(self.chunks.whole))  # before time is measured
        with bar("calibrate and quantize", len(parts), parts) as self.advance:
            for (stack, section), (entry, *stem), solve in zip(steps, entries, solves, strict=True):
                if stem:
                    self._enter(stack, stem[0])
                    self.advance(1)
                restored = self.progress.restore(entry, self.student, self.result)
                self._section(stack, section if solve and not restored else replace(section, steps=()))
                if not restored:
                    self.progress.write(entry, self.student, self.result)
                if section is stack.readout and stack.handed is not None:
                    self.own = handed(stack.handed, self.own, self.streams)
                    self.others = (
                        handed(stack.handed, self.others, self.teacher_streams) if self.teacher_streams else self.own
                    )
                self.advance(1)
        return self.result

    def _enter(self, stack: Stack, entry: str) -> None:
        """Solves the stem of a stack, and runs every batch up to its first block."""
        model = self.student.model
        if not self.progress.restore(entry, self.student, self.result):
            self._solve_stem(stack)
            self.progress.write(entry, self.student, self.result)
        if not (self.measures or self.refinement):
            return
        values: list[int] = []
        for task in self.own:
            self.streams[task] = enter(model, self.family, stack, self.own[task], self.store, values)
            if self.taught:
                with swapped_weights(model, self._stem(task)):
                    self.teacher_streams[task] = enter(model, self.family, stack, self.others[task], self.store, values)
                for own, teacher in zip(self.streams[task], self.teacher_streams[task], strict=True):
                    teacher.router.leader = own.router

    def _solve_stem(self, stack: Stack) -> None:
        """Solves the stem of a stack: the tables, kernels and norm in front of its first block."""
        norm = stack.first_norm
        if self.guidance.embeddings:
            solve_stem(self.student, stack, self.chunks.whole, self.own)
        if self.guidance.norms and norm is not None and has_gain(self.student.model.get_submodule(norm)):
            solve_norm(self.student, norm, [(task, self._first_rows(stack, task, norm)) for task in self.own])

    def _stem(self, task: str) -> dict[str, Tensor]:
        """The expert's tensors in front of the blocks."""
        sections = [section for stack in self.stacks for section in stack.sections]
        behind = tuple(section.name(name) for section in sections for name in section.module.state_dict())
        reference = self.student.reference
        return {name: reference.expert(task, name) for name in reference.names(behind)}

    def _first_rows(self, stack: Stack, task: str, norm: str) -> Iterator[LayerInputs]:
        """The inputs of the first norm."""
        own = self._first_inputs(stack, self.own[task], norm)
        teacher = own
        if self.guidance.teaches:
            with swapped_weights(self.student.model, self._stem(task)):
                teacher = self._first_inputs(stack, self.others[task], norm)
        pairs = zip(own, teacher, strict=True)
        for count in self.chunks.counts[task]:
            yield LayerInputs.joined([LayerInputs([mine], [others], None) for mine, others in islice(pairs, count)])

    def _first_inputs(self, stack: Stack, batches: Sequence[Batch], norm: str) -> list[Tensor]:
        """The inputs of the first norm in the present model, real tokens only, batch by batch."""
        model, module, rows = self.student.model, self.student.model.get_submodule(norm), []
        for batch in batches:
            arguments = inputs([module], lambda batch=batch: self.family.features(model, batch))  # type: ignore[misc]
            rows.append(real_tokens(arguments[0], stack.mask(batch)))
        return rows

    def _section(self, stack: Stack, section: Section) -> None:
        """Solves every step of a section. The forward pass of each batch pauses in front of each step."""
        token = stack.lone_token if section is stack.blocks[-1] and self.guidance.readout_weight < 1 else None
        with ExitStack() as hooks:
            hooks.enter_context(on_device(section.module))
            teacher = copy.deepcopy(section.module) if self.taught else section.module
            for module in {id(m): m for m in (section.module, teacher)}.values():
                hooks.enter_context(pause_hooks(module, section.modules, section.routers))
            self._fold(section, token)
            for index, step in enumerate(section.steps):
                spec = CaptureSpec.of(section.steps[index:], token, section.steps[index - 1] if index else None)
                if isinstance(step, Norm):
                    if self.guidance.norms and has_gain(section.module.get_submodule(step.name)):
                        solve_norm(self.student, section.name(step.name), self._rows(section, teacher, spec))
                elif token is not None and step.mixing:
                    own = tuple(name for name in step.names if name not in step.mixing)
                    if own:  # empty if queries, keys and values are one linear
                        self._linears(section, teacher, own, spec)
                    self._linears(section, teacher, step.mixing, replace(spec, token=None))
                else:
                    self._linears(section, teacher, step.names, spec)
                self.advance(1)
            if not section.steps:
                self._finish_students(section)  # first: teachers are routed as they are
            for task in self.teacher_streams:
                self.blocks.load(section, teacher, task)
                _finish(self.teacher_streams[task], teacher)
            if self.refinement is not None and section.steps and self._in_block(section):
                self.refinement.run(section, token, self.streams, self.teacher_streams, self.result)
            if section.steps:
                self._finish_students(section)
        self.blocks.release()

    def _finish_students(self, section: Section) -> None:
        """Runs the student's hidden states through the rest of a section."""
        for streams in self.streams.values():
            _finish(streams, section.module)

    def _fold(self, section: Section, token: int | None) -> None:
        """Folds the scales of transforms, such as AWQ, into the section, see fold.py."""
        rows_of = lambda spec: ((task, self._task_rows(section, None, task, spec)) for task in self.streams)  # noqa: E731
        if self.measures and fold_block(self.student, section, partial(self._quantizer, section), rows_of, token):
            for streams in self.streams.values():
                for stream in streams:
                    stream.rewind()

    def _rows(
        self, section: Section, teacher: nn.Module, spec: CaptureSpec
    ) -> Iterator[tuple[str, Iterator[LayerInputs]]]:
        """The inputs of a step, task by task and batch by batch."""
        for task in self.streams:
            if self.guidance.teaches:
                self.blocks.load(section, teacher, task, spec.ran)
            yield task, self._task_rows(section, teacher if self.guidance.teaches else None, task, spec)

    def _task_rows(
        self, section: Section, teacher: nn.Module | None, task: str, spec: CaptureSpec
    ) -> Iterator[LayerInputs]:
        """The inputs of a step for one task. Parts of a batch are joined, so sums do not depend on the split."""
        parts = self._part_rows(section, teacher, task, spec)
        for count in self.chunks.counts[task]:
            if count == 1:
                yield next(parts)
            else:
                yield LayerInputs.joined([part.copied() for part in islice(parts, count)])

    def _part_rows(
        self, section: Section, teacher: nn.Module | None, task: str, spec: CaptureSpec
    ) -> Iterator[LayerInputs]:
        """The inputs of a step for each part of a batch. Without a teacher, its rows are the student's."""
        teachers, scales = self.teacher_streams.get(task), self.student.read_scales(section.name(spec.names[0]))
        held = iter(self.chunks.held(task)) if self.guidance.safe else None
        for index, stream in enumerate(self.streams[task]):
            with stream.loaded():
                own = spec.rows(stream, section.module)
                weights = spec.weights(stream, self.guidance)
                apart = None if held is None else spec.tokens_of(next(held), stream, len(own[0]))
                if teachers is None or teacher is None:
                    yield LayerInputs(own, own, weights, apart)
                else:
                    with teachers[index].loaded():
                        others = spec.rows(teachers[index], teacher)
                        if scales is not None:
                            others[0] = others[0] / scales
                        yield LayerInputs(own, others, weights, apart)

    def _linears(self, section: Section, teacher: nn.Module, local: Sequence[str], spec: CaptureSpec) -> None:
        """Solves and quantizes linears that read the same input."""
        names, dtype = [section.name(name) for name in local], self.student.dtype
        quantizer, in_block = self._quantizer(section, names), self._in_block(section)
        outs = [len(self.student.model.get_parameter(f"{name}.weight")) for name in names]
        refinement = self.refinement if in_block else None
        if refinement is not None:
            refinement.keep_anchors(section, local)
        if self.measures:
            rows, scale = self._rows(section, teacher, spec), spec.scale if spec.stream else None
            problem, step, inputs_seen = measure_objective(self.student, names, rows, scale)
        measuring = quantizer.format is None and "inputs" in quantizer.needs  # the formats of a mix
        if self.measures and (inputs_seen.tokens or measuring):
            solutions, records = solve(problem, names, outs, inputs_seen, quantizer, dtype, step)
        else:
            solutions, records = quantize_anchor(self.student.stacked_anchor(names), names, outs, quantizer, dtype)
        if refinement is not None:
            refinement.keep_targets(local, solutions)
        for name, solution in zip(names, solutions, strict=True):
            self.student.put_affine(name, solution.weight.dequantize(), solution.bias)
            if in_block:
                self.result.weights.add(name, solution.weight)
        self.result.records.extend(records)

    def _in_block(self, section: Section) -> bool:
        """Whether a section is a block. Linears outside of blocks stay dense."""
        return all(section is not stack.readout for stack in self.stacks)

    def _quantizer(self, section: Section, names: Sequence[str]) -> Quantizer:
        """The quantizer of linears of a section; `NoQuantizer` outside of blocks."""
        return self.quantizer_of(names) if self._in_block(section) else NoQuantizer()

    def _quantizers_need_inputs(self) -> bool:
        for block in self.family.blocks(self.student.model):
            groups = [step.names for step in block.steps if isinstance(step, Linears)]
            if any("inputs" in self.quantizer_of([*map(block.name, names)]).needs for names in groups):
                return True
        return False


def _finish(streams: Sequence[HiddenState], module: nn.Module) -> None:
    """Runs hidden states through the rest of a section."""
    for stream in streams:
        with stream.loaded():
            stream.finish(module)


def _entries(number: int, first: bool) -> list[str]:
    """The progress entries of a section and, for the first section of a stack, of the stem."""
    return [f"{number:04}", f"{number:04}-stem"] if first else [f"{number:04}"]
