"""The calibration steps of `epmq run`: teacher outputs, the walks that quantize the merged model, the heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.activations.batch_invariant import batch_invariant
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.block_refinement import Chunks
from epmq_cli.calibrate.guidance import LIMITS, Guidance
from epmq_cli.calibrate.heads import solved_head
from epmq_cli.calibrate.passes import ProgressFor, no_progress, run_passes
from epmq_cli.calibrate.progress import WalkResult
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.calibrate.reference_weights import ReferenceWeights
from epmq_cli.calibrate.student import Student
from epmq_cli.calibrate.tune import Choice, choose
from epmq_cli.config.schema import GENERATE, bytes_of
from epmq_cli.data.batching import ALL, Batch, Batches, split, without
from epmq_cli.data.held_out import check_enough, filled, hold_out
from epmq_cli.data.views import with_views
from epmq_cli.evaluate.score import ScoredTask
from epmq_cli.families.family import Family, linear_shapes
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline.budget import with_sizes
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import Job
from epmq_cli.pipeline.output_divergence import mean_divergence, outputs_of, soft_labels, with_divergence
from epmq_cli.pipeline.progress import RunProgress
from epmq_cli.quantize.mixed_precision import MixedPrecision
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.refine.soft_labels import Outputs, SoftLabels
from epmq_cli.runtime import distributed, memory

MATRICES = 3  # the most float64 matrices (in, in) at once: H, its factor or inverse, and that in float32; rounded up
HELD_OUT = 1.5  # as many more with guidance.safe, if H waits on the same device: moments and H of held-out tokens

REFINED = 40  # bytes for each weight of a block: start, offset, best, target, anchor, value, gradient and its sum

FEATURES = "features"

TEMPERATURE = 2.0  # of the held-out divergence


class Anchor(Protocol):
    """The model that calibration starts from, tensor by tensor: the merge, or its refinement."""

    @property
    def source(self) -> MergeSource:
        """Base and experts."""

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the checkpoint stores the tensors."""

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name, in float32."""


@dataclass(frozen=True)
class TeacherOutputs:
    """The calibration batches of each task with its expert's answers, and the expert's features (samples, width) if
    heads are solved."""

    batches: Batches
    features: Mapping[str, Tensor]


@dataclass(frozen=True)
class CalibrationResult:
    """The result of the last walk, its guidance, and the choice of `auto` options, if any."""

    walk: WalkResult
    guidance: Guidance
    choice: Choice | None


def run_teachers(context: RunContext, model: nn.Module, source: MergeSource, drawn: Batches) -> TeacherOutputs:
    """Runs each expert on the calibration batches of its task. Overwrites the model's merged tensors."""
    job, cache = context.job, context.cache
    batches_by_task, features_by_task = dict(drawn), {}
    if job.family.answers or job.calib.source == GENERATE or solves_heads(job):
        for number, (task, batches) in enumerate(drawn.items()):
            make = partial(context.micro.run, partial(_expert_tensors, job, model, source, task, batches))
            if cache is not None:
                make = partial(cache.teacher_tensors, task, batches, solves_heads(job), make)
            tensors = context.progress.tensors(f"taught-{number}", job.device, make)
            completed = [{**batch, **_of_batch(tensors, index)} for index, batch in enumerate(batches)]
            batches_by_task[task] = [without(batch, job.family.tasks.consumed) for batch in completed]
            if solves_heads(job):
                features_by_task[task] = tensors[FEATURES]
    return TeacherOutputs(batches_by_task, features_by_task)


@torch.inference_mode()
def _expert_tensors(
    job: Job, model: nn.Module, source: MergeSource, task: str, batches: Sequence[Batch], samples: int
) -> dict[str, Tensor]:
    """The tensors that the expert adds to its task's batches, by batch index and name, and its features if heads are
    solved."""
    copy_into(model, source.model(task))
    with batch_invariant(model):
        completed = [job.family.complete(model, batch, samples) for batch in batches]
        tensors = {FEATURES: features(job.family, model, completed, samples)} if solves_heads(job) else {}
    for index, (batch, drawn) in enumerate(zip(completed, batches, strict=True)):
        tensors |= {f"{index}.{name}": tensor for name, tensor in batch.items() if tensor is not drawn.get(name)}
    return tensors


def _of_batch(tensors: Mapping[str, Tensor], index: int) -> Batch:
    """The new tensors of one batch."""
    return {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{index}.")}


@torch.inference_mode()
def features(family: Family, model: nn.Module, batches: Sequence[Batch], samples: int = ALL) -> Tensor:
    """The features (rows, width) of batches, computed for `samples` samples at a time."""
    return torch.cat([family.features(model, part) for batch in batches for part in split(batch, samples)])


def calibrate(
    context: RunContext, model: nn.Module, batches: Batches, tasks: Sequence[ScoredTask], anchor: Anchor
) -> CalibrationResult:
    """Calibrates and quantizes the model, which holds the anchor's tensors; the results replace them.

    Activations that exceed `calib.memory`, less the bytes of samples and moments, go to files in the run folder. After
    an out-of-memory error, the walk resumes from the progress with a smaller micro-batch and an equally smaller share
    of `calib.memory`.
    """
    job, micro, refiner = context.job, context.micro, None
    if job.blocks is not None and not isinstance(job.quantizer, NoQuantizer):
        refiner = job.blocks.refiner(job.seed)
        for task, group in batches.items() if job.blocks.held_out else ():
            check_enough(task, group, "refine=blocks")
    waiting = torch.device("cpu") if sums_wait(job) else None
    student = Student(model, job.family, references(job, model, anchor), job.guidance, anchor.dtype, waiting)
    quantizer = with_sizes(job, model, anchor.dtype)
    share = bytes_of("calib.memory", job.calib.memory) / distributed.world_size()
    viewed = {
        task: [with_views(batch, job.seed, job.calib.views) for batch in group] for task, group in batches.items()
    }
    budget = share - reserved_bytes(job, model, viewed)
    process_bytes = memory.taken if job.device.type == "cpu" else lambda: 0

    def walks(samples: int) -> CalibrationResult:
        with (
            ActivationStore(budget * samples / micro.most, context.folder, process_bytes) as store,
            torch.inference_mode(),
            batch_invariant(model),
        ):
            choice, guidance = None, job.guidance
            if guidance.open:
                divergence = HeldOutDivergence(student, batches, tasks, store, samples)
                choice = tune_guidance(student, divergence, context.progress)
                guidance = choice.guidance
            guided, chosen = replace(student, guidance=guidance), quantizer
            if isinstance(quantizer, MixedPrecision):
                chosen = with_divergence(quantizer, job.family, model, batches, tasks, samples)
            chunks = Chunks(viewed, samples, views=job.calib.views)
            walk = run_passes(guided, chunks, chosen, store, context.progress.of_walk, refiner)
            return CalibrationResult(walk, guidance, choice)

    return micro.run(walks, lambda: student.reference.restore(model))


def reserved_bytes(job: Job, model: nn.Module, batches: Batches) -> int:
    """The bytes of calibration that cannot go to files: the samples; for the widest linear, the moments of one task
    and of all tasks, the factor, its inverse and workspace; and what refine=blocks holds of the largest block."""
    samples = [tensor for group in batches.values() for batch in group for tensor in batch.values()]
    width = max(shape[1] for _, shape in linear_shapes(model, job.family))
    largest = max(sum(p.numel() for p in block.module.parameters()) for block in job.family.blocks(model))
    matrices = MATRICES + HELD_OUT if job.guidance.safe and not sums_wait(job) else MATRICES
    return sum(tensor.nbytes for tensor in samples) + int(matrices * 8 * width**2) + refined_bytes(job, largest)


def refined_bytes(job: Job, largest: int) -> int:
    """The bytes that refine=blocks holds of a block with `largest` weights."""
    return 0 if job.blocks is None else REFINED * largest


def sums_wait(job: Job) -> bool:
    """Whether the sums of finished tasks wait in the memory of the host, because the GPU has no space for the model."""
    return job.device.type != "cpu" and job.calib.student != "memory"


def references(job: Job, model: nn.Module, anchor: Anchor) -> ReferenceWeights:
    """The weights of base, experts and anchor. `model` must hold the anchor's weights."""
    own, readouts = model.state_dict(), [stack.readout for stack in job.family.stacks(model)]
    names = [readout.name(local) for readout in readouts for local in readout.module.state_dict()]
    shared = {name: own[name].clone() for name in names if name not in anchor.source.names}
    return ReferenceWeights(anchor.source, shared, anchor.tensor, job.guidance.targets == "merged")


class HeldOutDivergence:
    """How far the student's outputs are from its experts', on the samples that calibration does not see: T^2 KL of the
    logits at temperature T, the mean of the tasks by their weights. `store`, `samples`: see `run_passes`.

    The model holds the anchor's tensors before and afterwards, and other ones after a call.
    """

    def __init__(
        self,
        student: Student,
        batches: Batches,
        tasks: Sequence[ScoredTask],
        store: ActivationStore | None = None,
        samples: int = ALL,
    ) -> None:
        for name, group in batches.items():
            check_enough(name, group, "an auto option")
        self._student, self._tasks, self._store, self._samples = student, tasks, store, samples
        self._fitted, self._held = map(filled, hold_out(batches))
        self._labels, reference = dict[str, list[SoftLabels]](), student.reference
        for task in tasks:
            expert = ((name, reference.expert(task.name, name)) for name in reference.names())
            copy_into(student.model, expert)
            self._labels[task.name] = soft_labels(student.family, self._outputs(task), TEMPERATURE)
        reference.restore(student.model)

    def __call__(self, guidance: Guidance, progress_for: ProgressFor = no_progress) -> float:
        """The divergence after an unquantized walk with this guidance. `progress_for`: see `run_passes`."""
        student, total = replace(self._student, guidance=guidance), 0.0
        student.reference.restore(student.model)
        run_passes(student, Chunks(self._fitted, self._samples), NoQuantizer(), self._store, progress_for)
        for task in self._tasks:
            divergence = mean_divergence(self._outputs(task), self._labels[task.name], TEMPERATURE)
            total += guidance.factor(task.name) * divergence
        return total / sum(guidance.factor(task.name) for task in self._tasks)

    def _outputs(self, task: ScoredTask) -> Iterator[Outputs]:
        """The logits of the held-out samples."""
        return outputs_of(self._student.family, self._student.model, task, self._held[task.name], self._samples)


def tune_guidance(student: Student, divergence: HeldOutDivergence, progress: RunProgress | None = None) -> Choice:
    """Chooses the `auto` options of the student's guidance by their divergence, and restores the model afterwards.

    `progress` stores finished trials.
    """
    progress = progress or RunProgress()

    def attempt(guidance: Guidance) -> float:
        name = _trial(guidance)
        return progress.finished(name, lambda: divergence(guidance, progress.part(name).of_walk))

    choice = choose(student.guidance, attempt)
    student.reference.restore(student.model)
    return choice


def _trial(guidance: Guidance) -> str:
    return "trial " + " ".join(f"{name}={getattr(guidance, name)}" for name in LIMITS)


def solves_heads(job: Job) -> bool:
    """Whether heads are solved."""
    kinds = {"always": ("own", "made"), "own": ("own",), "never": ()}[job.guidance.heads]
    return job.family.heads in kinds


def solve_heads(
    context: RunContext, model: nn.Module, teachers: TeacherOutputs, tasks: Sequence[ScoredTask], guidance: Guidance
) -> list[ScoredTask]:
    """Solves the tasks' heads for the quantized model. Returns the tasks unchanged if heads are not solved."""
    if not solves_heads(context.job):
        return list(tasks)
    return context.micro.run(partial(_solve_heads, context.job, model, teachers, tasks, guidance))


def _solve_heads(
    job: Job, model: nn.Module, teachers: TeacherOutputs, tasks: Sequence[ScoredTask], guidance: Guidance, samples: int
) -> list[ScoredTask]:
    solved = []
    for task in tasks:
        with batch_invariant(model):
            own_rows = [features(job.family, model, [batch], samples) for batch in teachers.batches[task.name]]
        teacher_rows = torch.split(teachers.features[task.name], [len(rows) for rows in own_rows])
        own, teacher = (
            [job.family.head_inputs(model, part, task.head) for part in parts] for parts in (own_rows, teacher_rows)
        )
        head = Affine(task.head["weight"], task.head.get("bias"))
        result = solved_head(own, teacher, head, float(guidance.lam), distributed)
        tensors = {"weight": result.weight} | ({} if result.bias is None else {"bias": result.bias})
        solved.append(replace(task, head={**task.head, **tensors}))
    return solved


def summary(job: Job, calibrated: CalibrationResult) -> dict[str, Any]:
    """The `guidance` entry of metrics.json: the values and the trials that chose them."""
    used = {name: float(getattr(calibrated.guidance, name)) for name in LIMITS}
    trials = calibrated.choice.trials if calibrated.choice else []
    return {**used, "chosen": job.guidance.open, "trials": trials, "heads_solved": solves_heads(job)}
