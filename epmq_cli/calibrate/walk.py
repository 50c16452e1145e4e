"""The engine: walks the student section by section, calibrating and quantizing each group of linears on the way.

The student's inputs always come through the prefix that is already quantized. Inside a block the steps go in the order
of the forward pass, and inputs are measured again after each ("true sequential"). Where guidance asks for them, each
expert's own activations of the same samples walk along, one block of one expert in memory at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.embeddings import solve_stem
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.layer import LayerRecord, solve
from epmq_cli.calibrate.moments import Moments, real_tokens, task_weight
from epmq_cli.calibrate.norms import NormObjective, normalised, unit
from epmq_cli.calibrate.objective import Affine, Objective
from epmq_cli.calibrate.reference import Reference, install, installed
from epmq_cli.calibrate.streams import Stream, enter, inputs
from epmq_cli.calibrate.student import Student
from epmq_cli.console import track
from epmq_cli.errors import ModelError
from epmq_cli.families.family import Batch, Family, Linears, Norm, Section, Stack
from epmq_cli.quantize.grid import DenseWeight, QuantizedWeight
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.result import Quantizer

QuantizerOf = Callable[[Sequence[str]], Quantizer]
"""The quantizer of the linears of these names, which read the same input."""


@dataclass(frozen=True)
class Walked:
    """The result of a walk: the weights of the blocks' linears by module name, and the records in the order of the
    walk."""

    weights: dict[str, QuantizedWeight | DenseWeight]
    records: list[LayerRecord]


def walk(
    student: nn.Module,
    family: Family,
    batches: Mapping[str, Sequence[Batch]],
    reference: Reference,
    guidance: Guidance,
    quantizer_of: QuantizerOf,
    dtype: torch.dtype,
) -> Walked:
    """Calibrates the student and quantizes its blocks' linears; its tensors are replaced by what comes out.

    `batches`: calibration batches of each task, on the student's device. `dtype`: the type that scales and all that is
    not quantized are stored in.
    """
    return _Walk(Student(student, family, reference, guidance, dtype), batches, quantizer_of).run()


@dataclass(frozen=True)
class _Rows:
    """What reaches modules in one batch: the student's and the teacher's rows (tokens, width) by module, and the
    weights of the tokens, or None for 1."""

    student: list[Tensor]
    teacher: list[Tensor]
    weights: Tensor | None


@dataclass(frozen=True)
class _Reading:
    """Which modules of a section are listened to; the token whose rows count in full, or None where all do; whether
    they read the output of another stack."""

    names: tuple[str, ...]
    token: int | None = None
    memory: bool = False


class _Walk:
    """One walk through one student, stack by stack."""

    def __init__(self, student: Student, batches: Mapping[str, Sequence[Batch]], quantizer_of: QuantizerOf) -> None:
        self.student, self.quantizer_of = student, quantizer_of
        self.family, self.guidance = student.family, student.guidance
        self.stacks = self.family.stacks(student.model)
        self.own, self.others = dict(batches), dict(batches)  # of the student and of the teachers, stack by stack
        self.streams: dict[str, list[Stream]] = {}
        self.taught: dict[str, list[Stream]] = {}
        self.result = Walked({}, [])

    def run(self) -> Walked:
        """Every section in order."""
        steps = [(stack, section) for stack in self.stacks for section in stack.sections]
        for stack, section in track(steps, "calibrate and quantize"):
            if section is stack.blocks[0]:
                self._enter(stack)
            solved = section is not stack.readout or self.guidance.readout
            self._section(stack, section if solved else replace(section, steps=()))
            if section is stack.readout and stack.handed is not None:
                self.own = _handed(stack.handed, self.own, self.streams)
                self.others = _handed(stack.handed, self.others, self.taught) if self.taught else self.own
        return self.result

    def _enter(self, stack: Stack) -> None:
        """Sends every batch to the first block of a stack, solving what is in front of it on the way."""
        model, norm = self.student.model, stack.first_norm
        if self.guidance.embeddings:
            solve_stem(self.student, stack, self.own)
        if self.guidance.norms and norm is not None:
            self._norm(norm, [(task, self._first_rows(stack, task, norm)) for task in self.own])
        for task in self.own:
            self.streams[task] = enter(model, self.family, stack, self.own[task])
            if self.guidance.teaches:
                with installed(model, self._stem(task)):
                    self.taught[task] = enter(model, self.family, stack, self.others[task])

    def _stem(self, task: str) -> dict[str, Tensor]:
        """The expert's tensors in front of the blocks."""
        sections = [section for stack in self.stacks for section in stack.sections]
        behind = tuple(section.name(name) for section in sections for name in section.module.state_dict())
        reference = self.student.reference
        return {name: reference.expert(task, name) for name in reference.names(behind)}

    def _first_rows(self, stack: Stack, task: str, norm: str) -> Iterator[_Rows]:
        """What reaches the first norm."""
        own = self._first_inputs(stack, self.own[task], norm)
        taught = own
        if self.guidance.teaches:
            with installed(self.student.model, self._stem(task)):
                taught = self._first_inputs(stack, self.others[task], norm)
        for mine, others in zip(own, taught, strict=True):
            yield _Rows([mine], [others], None)

    def _first_inputs(self, stack: Stack, batches: Sequence[Batch], norm: str) -> list[Tensor]:
        """The rows of real tokens that reach the first norm as the model is now, batch by batch."""
        model, module, found = self.student.model, self.student.model.get_submodule(norm), []
        for batch in batches:
            reached = inputs([module], lambda batch=batch: self.family.features(model, batch))  # type: ignore[misc]
            found.append(real_tokens(reached[0], stack.mask(batch)))
        return found

    def _section(self, stack: Stack, section: Section) -> None:
        """Every step of a section, then every batch through it."""
        teacher = copy.deepcopy(section.module) if self.guidance.teaches else section.module
        token = stack.read_token if section is stack.blocks[-1] and self.guidance.readout_weight < 1 else None
        for step in section.steps:
            if isinstance(step, Norm):
                if self.guidance.norms:
                    reading = _Reading((step.name,), None if step.mixing else token)
                    self._norm(section.name(step.name), self._rows(section, teacher, reading))
            elif token is not None and step.mixing:
                own = tuple(name for name in step.names if name not in step.mixing)
                self._linears(section, teacher, replace(step, names=own), token)
                self._linears(section, teacher, replace(step, names=step.mixing), None)
            else:
                self._linears(section, teacher, step, token)
        for streams in self.streams.values():
            for stream in streams:
                stream.advance(section.module)
        for task, streams in self.taught.items():
            self._load(section, teacher, task)
            for stream in streams:
                stream.advance(teacher)

    def _load(self, section: Section, teacher: nn.Module, task: str) -> None:
        """Makes the teacher's module the expert's."""
        if self.guidance.teaches:
            names = teacher.state_dict()
            install(teacher, {name: self.student.reference.expert(task, section.name(name)) for name in names})

    def _rows(self, section: Section, teacher: nn.Module, reading: _Reading) -> Iterator[tuple[str, Iterator[_Rows]]]:
        """For each task, what reaches modules of a section, batch by batch."""
        for task in self.streams:
            self._load(section, teacher, task)
            yield task, self._task_rows(section, teacher, task, reading)

    def _task_rows(self, section: Section, teacher: nn.Module, task: str, reading: _Reading) -> Iterator[_Rows]:
        taught = self.taught.get(task)
        for index, stream in enumerate(self.streams[task]):
            own = _reach(section.module, reading, stream)
            other = _reach(teacher, reading, taught[index]) if taught else own
            yield _Rows(own, other, None if reading.token is None else self._weights(stream, reading.token))

    def _weights(self, stream: Stream, token: int) -> Tensor:
        """1 for the token that is read out, `readout_weight` for the others: (tokens,)."""
        weights = torch.full_like(stream.hidden[..., :1], self.guidance.readout_weight)
        weights[:, token] = 1
        return real_tokens(weights, stream.mask)[:, 0]

    def _norm(self, name: str, tasks: Iterable[tuple[str, Iterator[_Rows]]]) -> None:
        """Solves a norm."""
        norm, anchor = self.student.model.get_submodule(name), self.student.affine_anchor(name)
        added = unit(norm)
        objective = NormObjective(anchor.weight + added, anchor.bias, float(self.guidance.lam))
        for task, batches in tasks:
            expert = self.student.affine_expert(task, name)
            for rows in batches:
                z = normalised(norm, rows.student[0])
                taught = z + float(self.guidance.alpha) * (normalised(norm, rows.teacher[0]) - z)
                objective.add(z, taught, rows.weights, expert.weight + added, expert.bias)
            objective.close(self.guidance.factor(task))
        gain, bias = objective.solve()
        self.student.put_affine(name, gain - added, bias)

    def _linears(self, section: Section, teacher: nn.Module, step: Linears, token: int | None) -> None:
        """Solves and quantizes the linears of one group, their rows quantized in one go since they share H."""
        names = [section.name(name) for name in step.names]
        objective, tokens = self._measure(section, teacher, step, token)
        in_block = all(section is not stack.readout for stack in self.stacks)
        quantizer = self.quantizer_of(names) if in_block else NoQuantizer()
        found, records = solve(objective, names, tokens, quantizer, self.student.dtype)
        for index, (name, weight) in enumerate(zip(names, found, strict=True)):
            dequantized = weight.dequantize()
            self.student.put_affine(name, dequantized, objective.bias(index, dequantized))
            if in_block:
                self.result.weights[name] = weight
        self.result.records.extend(records)

    def _measure(self, section: Section, teacher: nn.Module, step: Linears, token: int | None) -> tuple[Objective, int]:
        """The objective of the linears of one group, and the tokens it was measured on."""
        names = [section.name(name) for name in step.names]
        anchors = [self.student.affine_anchor(name) for name in names]
        intercepts = self.guidance.intercepts and all(anchor.bias is not None for anchor in anchors)
        objective, total = Objective(anchors, float(self.guidance.lam), intercepts), 0
        reading = _Reading((step.names[0], *([step.stream] if step.stream else [])), token, step.memory)
        for task, batches in self._rows(section, teacher, reading):
            experts = [self.student.affine_expert(task, name) for name in names]
            width, outs = anchors[0].weight.shape[1], [len(anchor.weight) for anchor in anchors]
            moments = Moments(width, outs, anchors[0].weight.device)
            for rows in batches:
                moments.add(rows.student[0], self._parts(rows, experts), rows.weights)
                total += len(rows.student[0])
            if not torch.isfinite(moments.xx).all():
                raise ModelError(
                    f"the inputs of {names[0]} hold a NaN or an infinity on task {task}; "
                    "check the experts and the merge"
                )
            s = task_weight(moments.xx, moments.tokens, self.guidance.task_weight)
            objective.add(moments, experts, s * self.guidance.factor(task))
        return objective, total

    def _parts(self, rows: _Rows, experts: Sequence[Affine]) -> list[Tensor | None]:
        """The part of each linear's target (tokens, out) that is no weight times the student's inputs."""
        alpha, beta = float(self.guidance.alpha), float(self.guidance.beta)
        if not self.guidance.teaches:
            return [None] * len(experts)
        drift = alpha * (rows.teacher[0] - rows.student[0])
        parts = [drift @ expert.weight.T for expert in experts]
        if len(rows.student) > 1:
            parts = [part + beta * (rows.teacher[1] - rows.student[1]) for part in parts]
        return list(parts)


def _reach(module: nn.Module, reading: _Reading, stream: Stream) -> list[Tensor]:
    """The rows of real tokens (tokens, width) that reach these modules of a section."""
    reached = inputs([module.get_submodule(name) for name in reading.names], lambda: stream.through(module))
    mask = stream.memory if reading.memory else stream.mask
    return [real_tokens(rows, mask if rows.ndim > 2 else None) for rows in reached]


def _handed(
    key: str, batches: Mapping[str, Sequence[Batch]], streams: Mapping[str, Sequence[Stream]]
) -> dict[str, Sequence[Batch]]:
    """The batches with what came out of a stack, for the next one."""
    return {
        task: [{**batch, key: stream.hidden} for batch, stream in zip(batches[task], found, strict=True)]
        for task, found in streams.items()
    }
