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
from epmq_cli.calibrate.norms import NormObjective, normalised
from epmq_cli.calibrate.objective import Affine, Objective
from epmq_cli.calibrate.reference import Reference, install, installed
from epmq_cli.calibrate.streams import Stream, enter, inputs
from epmq_cli.calibrate.student import Student
from epmq_cli.console import track
from epmq_cli.errors import ModelError
from epmq_cli.families.family import Batch, Family, Linears, Norm, Section
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


class _Walk:
    """One walk through one student."""

    def __init__(self, student: Student, batches: Mapping[str, Sequence[Batch]], quantizer_of: QuantizerOf) -> None:
        self.student, self.batches, self.quantizer_of = student, batches, quantizer_of
        self.family, self.guidance = student.family, student.guidance
        self.blocks, self.readout = self.family.blocks(student.model), self.family.readout(student.model)
        self.streams: dict[str, list[Stream]] = {}
        self.taught: dict[str, list[Stream]] = {}
        self.result = Walked({}, [])

    def run(self) -> Walked:
        """Every section in order."""
        self._enter()
        for section in track(self.blocks, "calibrate and quantize"):
            self._section(section, weighted=section is self.blocks[-1])
        if self.guidance.readout:
            for streams in (*self.streams.values(), *self.taught.values()):
                streams[:] = [replace(stream, rest=(), options={}) for stream in streams]
            self._section(self.readout, weighted=False)
        return self.result

    def _enter(self) -> None:
        """Sends every batch to the first block, solving what is in front of it on the way."""
        model, first, norm = self.student.model, self.blocks[0].module, self.family.first_norm
        if self.guidance.embeddings:
            solve_stem(self.student, self.batches)
        if self.guidance.norms and norm is not None:
            self._norm(norm, [(task, self._first_rows(task, norm)) for task in self.batches])
        for task, batches in self.batches.items():
            self.streams[task] = enter(model, self.family, first, batches)
            if self.guidance.teaches:
                with installed(model, self._stem(task)):
                    self.taught[task] = enter(model, self.family, first, batches)

    def _stem(self, task: str) -> dict[str, Tensor]:
        """The expert's tensors in front of the first block."""
        sections = [*self.blocks, self.readout]
        behind = tuple(section.name(name) for section in sections for name in section.module.state_dict())
        reference = self.student.reference
        return {name: reference.expert(task, name) for name in reference.names(behind)}

    def _first_rows(self, task: str, norm: str) -> Iterator[_Rows]:
        """What reaches the first norm."""
        own = self._first_inputs(task, norm)
        taught = own
        if self.guidance.teaches:
            with installed(self.student.model, self._stem(task)):
                taught = self._first_inputs(task, norm)
        for mine, others in zip(own, taught, strict=True):
            yield _Rows([mine], [others], None)

    def _first_inputs(self, task: str, norm: str) -> list[Tensor]:
        """The rows of real tokens that reach the first norm as the model is now, batch by batch."""
        model, module, found = self.student.model, self.student.model.get_submodule(norm), []
        for batch in self.batches[task]:
            reached = inputs([module], lambda batch=batch: self.family.features(model, batch))  # type: ignore[misc]
            found.append(real_tokens(reached[0], self.family.token_mask(batch)))
        return found

    def _section(self, section: Section, weighted: bool) -> None:
        """Every step of a section, then every batch through it."""
        teacher = copy.deepcopy(section.module) if self.guidance.teaches else section.module
        weighted = weighted and self.guidance.readout_weight < 1 and self.family.read_token is not None
        for step in section.steps:
            if isinstance(step, Norm):
                if self.guidance.norms:
                    rows = self._rows(section, teacher, [step.name], weighted and not step.mixing)
                    self._norm(section.name(step.name), rows)
            elif weighted and step.mixing:
                reading = tuple(name for name in step.names if name not in step.mixing)
                self._linears(section, teacher, replace(step, names=reading), weighted=True)
                self._linears(section, teacher, replace(step, names=step.mixing), weighted=False)
            else:
                self._linears(section, teacher, step, weighted)
        for streams in self.streams.values():
            for stream in streams:
                stream.hidden = stream.through(section.module)
        for task, streams in self.taught.items():
            self._load(section, teacher, task)
            for stream in streams:
                stream.hidden = stream.through(teacher)

    def _load(self, section: Section, teacher: nn.Module, task: str) -> None:
        """Makes the teacher's module the expert's."""
        if self.guidance.teaches:
            names = teacher.state_dict()
            install(teacher, {name: self.student.reference.expert(task, section.name(name)) for name in names})

    def _rows(
        self, section: Section, teacher: nn.Module, names: Sequence[str], weighted: bool
    ) -> Iterator[tuple[str, Iterator[_Rows]]]:
        """For each task, what reaches these modules of a section, batch by batch."""
        for task in self.streams:
            self._load(section, teacher, task)
            yield task, self._task_rows(section, teacher, task, names, weighted)

    def _task_rows(
        self, section: Section, teacher: nn.Module, task: str, names: Sequence[str], weighted: bool
    ) -> Iterator[_Rows]:
        taught = self.taught.get(task)
        for index, stream in enumerate(self.streams[task]):
            own = _reach(section.module, names, stream)
            other = _reach(teacher, names, taught[index]) if taught else own
            yield _Rows(own, other, self._weights(stream) if weighted else None)

    def _weights(self, stream: Stream) -> Tensor:
        """1 for the token that is read out, `readout_weight` for the others: (tokens,)."""
        weights = torch.full_like(stream.hidden[..., :1], self.guidance.readout_weight)
        weights[:, self.family.read_token] = 1
        return real_tokens(weights, stream.mask)[:, 0]

    def _norm(self, name: str, tasks: Iterable[tuple[str, Iterator[_Rows]]]) -> None:
        """Solves a norm."""
        norm, anchor = self.student.model.get_submodule(name), self.student.affine_anchor(name)
        objective = NormObjective(anchor.weight, anchor.bias, float(self.guidance.lam))
        for task, batches in tasks:
            expert = self.student.affine_expert(task, name)
            for rows in batches:
                z = normalised(norm, rows.student[0])
                taught = z + float(self.guidance.alpha) * (normalised(norm, rows.teacher[0]) - z)
                objective.add(z, taught, rows.weights, expert.weight, expert.bias)
            objective.close(self.guidance.factor(task))
        self.student.put_affine(name, *objective.solve())

    def _linears(self, section: Section, teacher: nn.Module, step: Linears, weighted: bool) -> None:
        """Solves and quantizes the linears of one group, their rows quantized in one go since they share H."""
        names = [section.name(name) for name in step.names]
        objective, tokens = self._measure(section, teacher, step, weighted)
        in_block = section is not self.readout
        quantizer = self.quantizer_of(names) if in_block else NoQuantizer()
        found, records = solve(objective, names, tokens, quantizer, self.student.dtype)
        for index, (name, weight) in enumerate(zip(names, found, strict=True)):
            dequantized = weight.dequantize()
            self.student.put_affine(name, dequantized, objective.bias(index, dequantized))
            if in_block:
                self.result.weights[name] = weight
        self.result.records.extend(records)

    def _measure(self, section: Section, teacher: nn.Module, step: Linears, weighted: bool) -> tuple[Objective, int]:
        """The objective of the linears of one group, and the tokens it was measured on."""
        names = [section.name(name) for name in step.names]
        anchors = [self.student.affine_anchor(name) for name in names]
        intercepts = self.guidance.intercepts and all(anchor.bias is not None for anchor in anchors)
        objective, total = Objective(anchors, float(self.guidance.lam), intercepts), 0
        reached = [step.names[0], *([step.stream] if step.stream else [])]
        for task, batches in self._rows(section, teacher, reached, weighted):
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


def _reach(module: nn.Module, names: Sequence[str], stream: Stream) -> list[Tensor]:
    """The rows of real tokens (tokens, width) that reach these modules of a section."""
    reached = inputs([module.get_submodule(name) for name in names], lambda: stream.through(module))
    return [real_tokens(rows, stream.mask if rows.ndim > 2 else None) for rows in reached]
