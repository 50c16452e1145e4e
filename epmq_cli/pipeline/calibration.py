"""The calibration steps of `epmq run`: teacher outputs, the walks from the merged to the quantized model, the heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.activations.batch_invariant import batch_invariant
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.guidance import LIMITS, Guidance
from epmq_cli.calibrate.heads import relative_error, solved_head
from epmq_cli.calibrate.passes import run_passes
from epmq_cli.calibrate.progress import WalkResult
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.calibrate.reference_weights import ReferenceWeights, copy_into
from epmq_cli.calibrate.tune import Choice, choose, holdout_split
from epmq_cli.config.schema import bytes_of
from epmq_cli.data.batching import ALL, Batch, split
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.evaluate.score import ScoredTask
from epmq_cli.families.family import Family
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.source import MergeSource
from epmq_cli.pipeline.job import Job
from epmq_cli.pipeline.preflight import linear_shapes
from epmq_cli.pipeline.progress import RunProgress
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.runtime import distributed, memory

Batches = Mapping[str, Sequence[Batch]]
ExpertOutputs = tuple[list[Batch], Tensor | None]
"""A task's calibration batches as its expert completed them, and the expert's features if wanted."""
TeacherCache = Callable[[str, Sequence[Batch], bool, Callable[[], ExpertOutputs]], ExpertOutputs]
"""Gives the expert's outputs on a task's batches, with or without features, from the cache or from the function."""

MATRICES = 6  # of float64, (in, in), held at a time at most, fragmentation included

FEATURES = "features"


@dataclass(frozen=True)
class TeacherOutputs:
    """The calibration batches of each task as its expert completed them, and the expert's features (samples, width) if
    heads are solved."""

    batches: Batches
    features: Mapping[str, Tensor]


@dataclass(frozen=True)
class CalibrationResult:
    """The result of the last walk, its guidance, and how `auto` options were chosen, if any."""

    walk: WalkResult
    guidance: Guidance
    choice: Choice | None


def run_teachers(
    job: Job,
    model: nn.Module,
    source: MergeSource,
    drawn: Batches,
    state: RunProgress | None = None,
    teacher_cache: TeacherCache | None = None,
    micro: MicroBatcher | None = None,
) -> TeacherOutputs:
    """Runs each expert on the calibration batches of its task.

    Overwrites the model's merged tensors. `state`: keeps what is finished.
    """
    attempt = (micro or micro_batcher(job)).run
    calibration, taught = dict(drawn), {}
    if job.family.answers or solves_heads(job):
        for number, (task, batches) in enumerate(drawn.items()):
            made = partial(attempt, partial(_asked, job, model, source, task, batches))
            ask = partial(teacher_cache, task, batches, solves_heads(job), made) if teacher_cache else made
            found = (state or RunProgress()).tensors(f"taught-{number}", job.device, partial(_added, batches, ask))
            calibration[task] = [{**batch, **_of(found, index)} for index, batch in enumerate(batches)]
            if solves_heads(job):
                taught[task] = found[FEATURES]
    return TeacherOutputs(calibration, taught)


@torch.inference_mode()
def _asked(
    job: Job, model: nn.Module, source: MergeSource, task: str, batches: Sequence[Batch], samples: int
) -> ExpertOutputs:
    copy_into(model, source.model(task))
    with batch_invariant(model):
        completed = [job.family.complete(model, batch, samples) for batch in batches]
        return completed, features(job.family, model, completed, samples) if solves_heads(job) else None


def _added(batches: Sequence[Batch], ask: Callable[[], ExpertOutputs]) -> dict[str, Tensor]:
    """The tensors that the expert adds to its task's batches, by number and name, and its features."""
    completed, features_of = ask()
    found: dict[str, Tensor] = {}
    for index, (batch, drawn) in enumerate(zip(completed, batches, strict=True)):
        found |= {f"{index}.{name}": tensor for name, tensor in batch.items() if tensor is not drawn.get(name)}
    return found if features_of is None else {**found, FEATURES: features_of}


def _of(found: Mapping[str, Tensor], index: int) -> Batch:
    """The tensors added to one batch."""
    return {key.partition(".")[2]: tensor for key, tensor in found.items() if key.startswith(f"{index}.")}


@torch.inference_mode()
def features(family: Family, model: nn.Module, batches: Sequence[Batch], samples: int = ALL) -> Tensor:
    """The features (rows, width) of some batches, computed for `samples` samples at a time."""
    return torch.cat([family.features(model, part) for batch in batches for part in split(batch, samples)])


def calibrate(
    job: Job,
    model: nn.Module,
    calibration: Batches,
    tasks: Sequence[ScoredTask],
    merged: LazyMerge,
    folder: Path | None = None,
    state: RunProgress | None = None,
    micro: MicroBatcher | None = None,
) -> CalibrationResult:
    """Walks the merged model, whose tensors are replaced by what comes out; activations that `calib.memory` has no room
    for beside samples and moments go to files in the folder, the system's own unless given. `state`: where what is
    finished is kept, from which it goes on where memory did not suffice. `room`: how many samples go through the model
    at a time; where that is less than all of a batch, less waits in memory too."""
    reference, dtype, kept, micro = (
        references(job, model, merged),
        merged.dtype,
        state or RunProgress(),
        micro or micro_batcher(job),
    )
    budget = bytes_of("calib.memory", job.calib.memory) / distributed.world_size() - reserved_bytes(
        job, model, calibration
    )
    taken = memory.taken if job.device.type == "cpu" else lambda: 0

    def walks(samples: int) -> CalibrationResult:
        with (
            ActivationStore(budget * samples / micro.most, folder, taken) as store,
            torch.inference_mode(),
            batch_invariant(model),
        ):
            rest = (reference, dtype, store, kept, samples)
            choice = tune_guidance(job, model, calibration, tasks, *rest) if job.guidance.open else None
            guidance = choice.guidance if choice else job.guidance
            return CalibrationResult(
                run_passes(
                    model,
                    job.family,
                    calibration,
                    reference,
                    guidance,
                    job.quantizer,
                    dtype,
                    store,
                    kept.of_walk,
                    samples,
                ),
                guidance,
                choice,
            )

    return micro.run(walks, lambda: reference.restore(model))


def micro_batcher(job: Job) -> MicroBatcher:
    """As many samples at a time as a calibration batch has; of several processes all would have to try less together,
    which they do not."""
    return MicroBatcher(
        min(job.calib.batch_size, job.calib.samples),
        "calibration",
        "lower max_length of the suite's tasks or calib.memory, use a device with more memory, or device=cpu with "
        "calib.student=disk",
        retries=distributed.world_size() == 1,
    )


def reserved_bytes(job: Job, model: nn.Module, calibration: Batches) -> int:
    """Bytes that calibration holds all the time or in its widest linear, whatever is in files: its samples, and the
    moments of one task and of all with their factor, its inverse and what these are made of."""
    samples = [tensor for group in calibration.values() for batch in group for tensor in batch.values()]
    width = max(shape[1] for _, shape in linear_shapes(model, job.family))
    return sum(tensor.nbytes for tensor in samples) + MATRICES * 8 * width**2


def references(job: Job, model: nn.Module, merged: LazyMerge) -> ReferenceWeights:
    """Base and experts, beside the merged model, which is what is in `model` now."""
    own, readouts = model.state_dict(), [stack.readout for stack in job.family.stacks(model)]
    names = [readout.name(local) for readout in readouts for local in readout.module.state_dict()]
    shared = {name: own[name].clone() for name in names if name not in merged.source.names}
    return ReferenceWeights(merged.source, shared, merged.tensor, job.guidance.targets == "merged")


def tune_guidance(
    job: Job,
    model: nn.Module,
    calibration: Batches,
    tasks: Sequence[ScoredTask],
    reference: ReferenceWeights,
    dtype: torch.dtype,
    store: ActivationStore | None = None,
    state: RunProgress | None = None,
    samples: int = ALL,
) -> Choice:
    """Chooses the options of guidance that are `auto`; the model is left as it was. `state`: where what is finished is
    kept. `samples`: how many go through the model at a time."""
    kept = state or RunProgress()
    fitted, holdout = holdout_split(calibration)
    taught = {}
    for task in tasks:
        copy_into(model, ((name, reference.expert(task.name, name)) for name in reference.names()))
        taught[task.name] = job.family.logits(
            model, features(job.family, model, holdout[task.name], samples), task.head
        )

    def error(guidance: Guidance) -> float:
        reference.restore(model)
        part = kept.part(_trial(guidance))
        run_passes(model, job.family, fitted, reference, guidance, NoQuantizer(), dtype, store, part.of_walk, samples)
        total = 0.0
        for task in tasks:
            own = job.family.logits(model, features(job.family, model, holdout[task.name], samples), task.head)
            total += guidance.factor(task.name) * relative_error(own, taught[task.name], distributed)
        return total / sum(guidance.factor(task.name) for task in tasks)

    choice = choose(job.guidance, lambda guidance: kept.finished(_trial(guidance), lambda: error(guidance)))
    reference.restore(model)
    return choice


def _trial(guidance: Guidance) -> str:
    return "trial " + " ".join(f"{name}={getattr(guidance, name)}" for name in LIMITS)


def solves_heads(job: Job) -> bool:
    """Whether heads are solved."""
    wanted = {"always": ("own", "made"), "own": ("own",), "never": ()}[job.guidance.heads]
    return job.family.heads in wanted


def solve_heads(
    job: Job,
    model: nn.Module,
    taught: TeacherOutputs,
    tasks: Sequence[ScoredTask],
    guidance: Guidance,
    micro: MicroBatcher | None = None,
) -> list[ScoredTask]:
    """The tasks with the heads that suit the quantized model, or as they were where heads are not solved. `room`: how
    many samples go through it at a time."""
    if not solves_heads(job):
        return list(tasks)
    return (micro or micro_batcher(job)).run(partial(_solved_heads, job, model, taught, tasks, guidance))


def _solved_heads(
    job: Job, model: nn.Module, taught: TeacherOutputs, tasks: Sequence[ScoredTask], guidance: Guidance, samples: int
) -> list[ScoredTask]:
    solved = []
    for task in tasks:
        with batch_invariant(model):
            found = [features(job.family, model, [batch], samples) for batch in taught.batches[task.name]]
        taught_rows = torch.split(taught.features[task.name], [len(rows) for rows in found])
        own, teacher = (
            [job.family.head_inputs(model, part, task.head) for part in parts] for parts in (found, taught_rows)
        )
        head = Affine(task.head["weight"], task.head.get("bias"))
        result = solved_head(own, teacher, head, float(guidance.lam), distributed)
        tensors = {"weight": result.weight} | ({} if result.bias is None else {"bias": result.bias})
        solved.append(replace(task, head={**task.head, **tensors}))
    return solved


def summary(job: Job, calibrated: CalibrationResult) -> dict[str, Any]:
    """The guidance in metrics.json: the values and the trials that led to them."""
    used = {name: float(getattr(calibrated.guidance, name)) for name in LIMITS}
    trials = calibrated.choice.trials if calibrated.choice else []
    return {**used, "chosen": job.guidance.open, "trials": trials, "heads_solved": solves_heads(job)}
