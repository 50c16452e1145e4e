"""The steps of `epmq run` and `epmq eval`. Each is a function of the results of earlier steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.merge_data import Batches, ExpertMeasurements
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.checkpoint.load import load
from epmq_cli.checkpoint.open_clip import check_base
from epmq_cli.config import schema
from epmq_cli.data.batching import Batch
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.data.sampling import batches, draw, sequences
from epmq_cli.data.suite import Task
from epmq_cli.errors import DataError
from epmq_cli.evaluate.lm_eval import harness_scores
from epmq_cli.evaluate.score import ScoreCache, ScoredTask, Scores, compute, micro_batcher, scores
from epmq_cli.families.family import Family, load_model
from epmq_cli.families.heads.classifier import check_single_label
from epmq_cli.families.inputs import check_inputs
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.merge.engine import SuiteModels, fit_source, written_dtype
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.processor_files import ProcessorFiles
from epmq_cli.models.processor_folder import Processor
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline.job import Job
from epmq_cli.pipeline.preflight import (
    check_described,
    check_groups,
    check_kernel,
    check_lengths,
    check_parts,
    linear_shapes,
    rounded,
)
from epmq_cli.pipeline.scored_tasks import head_names, scored_task, scores_samples
from epmq_cli.pipeline.task_processors import Processors
from epmq_cli.quantize.mixed_precision import formats_of
from epmq_cli.runtime import distributed
from epmq_cli.runtime.console import track
from epmq_cli.runtime.disk_offload import Disk


def open_models(job: Job, folder: Path | None = None) -> tuple[SuiteModels, nn.Module, torch.dtype]:
    """Opens the suite and the base model. Also returns the type of the scales and of the tensors that stay dense.

    The model is on the device or, with `calib.student=disk`, in files in the folder. It computes in float32 with
    weights rounded to that type. Buffers that are not stored, such as rotary frequencies, are not rounded.
    """
    models = SuiteModels(job.suite, job.family)
    if job.exporter.open_clip:
        check_base(models.base)
    ProcessorFiles(models.base.path)  # fails early if transformers cannot load them
    dtype = written_dtype(models.source, job.exporter.dtype)
    check_lengths(job.suite, job.family, models.base.path)
    place = Disk(folder) if job.calib.student == "disk" else job.device
    read = (
        dtype if dtype == models.source.main_dtype else torch.float32
    )  # the config may name a narrower type than the files have
    model = fit_source(load_model(job.family, models.base.path, place, read), models)
    check_parts(model, job.family)
    check_described(model, job.family, models)
    own = model.state_dict().items()
    copy_into(model, ((name, rounded(name, tensor, dtype)) for name, tensor in own if tensor.is_floating_point()))
    formats = formats_of(job.quantizer)
    check_groups(model, job.family, formats)
    job.exporter.check_linears(dict(linear_shapes(model, job.family)), model, formats)
    check_kernel(model, job.family, formats if job.exporter.packs else [], job.evaluation, job.device)
    return models, model, dtype


def merge_data(
    job: Job, model: nn.Module, source: MergeSource, batches: Batches, tasks: Sequence[ScoredTask], micro: MicroBatcher
) -> ExpertMeasurements | None:
    """The data on which the merge method measures the experts: calibration batches with the experts' answers, and the
    heads of the tasks. None if the method needs no data. Measuring may overwrite the model's merged tensors."""
    if not job.merge.needs:
        return None
    memory = schema.bytes_of("calib.memory", job.calib.memory) // distributed.world_size()
    heads = {task.name: task.head for task in tasks}
    return ExpertMeasurements(model, job.family, source, batches, heads, micro, memory)


def prepare_tasks(
    job: Job, base_model: nn.Module, models: SuiteModels, processors: Processors | None = None
) -> list[ScoredTask]:
    """The tasks with their test samples and heads. The base model computes the heads, or the experts contain them.
    `processors`: the result of `task_processors`."""
    prepared, family = [], job.family
    scored = scores_samples(job.evaluation)
    for task in track(job.suite.members, "read tasks"):
        expert = models.experts[task.name]
        with torch.inference_mode():
            head = family.head(base_model, models.base.path, task, expert, job.device)
        if scored and family.heads == "own":
            check_single_label(expert, task.name)
        names, own = head_names(family, models, task, head, scored), (processors or {}).get(task.name)
        count = job.evaluation.samples if scored else 0
        prepared.append(scored_task(family, models.base.path, task, head, names, count, job.seed, own))
    return prepared


def calibration_batches(job: Job, base: Path, processors: Processors | None = None) -> dict[str, list[Batch]]:
    """Each task's calibration batches on the device, limited to this process's share. `processors`: the result of
    `task_processors`."""
    drawn = {}
    for task in track(job.suite.members, "read calibration data"):
        own = (processors or {}).get(task.name)
        if isinstance(job.family.tasks, LanguageModel):
            samples = sequences(task, partial(_tokens, job.family, base, task, own), job.calib.samples, job.seed)
        else:
            samples = draw(task, job.calib.samples, job.seed).by_length()
            check_inputs(job.family, task.name, samples.inputs)
        size = job.calib.batch_size
        starts = distributed.rank_slice(range(0, len(samples), size))
        if not starts:
            raise DataError(
                f"task {task.name} has {math.ceil(len(samples) / size)} calibration batches, too few for "
                f"{distributed.world_size()} processes; lower calib.batch_size or start fewer processes"
            )
        drawn[task.name] = list(batches(samples, job.family.collate(base, task, own), size, job.device, starts))
    return drawn


def _tokens(family: Family, folder: Path, task: Task, processor: Processor | None, documents: Sequence[Any]) -> Tensor:
    check_inputs(family, task.name, documents)
    assert isinstance(family.tasks, LanguageModel)
    return family.tasks.tokens(folder, documents, processor)


def score(
    job: Job,
    model: nn.Module,
    tasks: list[ScoredTask],
    stage: str,
    folder: Path,
    score_cache: ScoreCache = compute,
    micro: MicroBatcher | None = None,
) -> Scores:
    """The scores of one stage; empty if the stage is not in `eval.stages`. `folder` contains the processor."""
    if stage not in job.evaluation.stages or not distributed.is_main():
        return {}
    return stage_scores(job.evaluation, job.family, model, tasks, job.device, stage, folder, score_cache, micro)


def stage_scores(
    evaluation: schema.Evaluation,
    family: Family,
    model: nn.Module,
    tasks: list[ScoredTask],
    device: torch.device,
    stage: str,
    folder: Path,
    score_cache: ScoreCache = compute,
    micro: MicroBatcher | None = None,
) -> Scores:
    """Scores a model on the suite's tasks, or on tasks of lm-evaluation-harness. `micro`: chooses how many samples run
    through the model at a time."""
    micro = micro or micro_batcher(evaluation.batch_size)
    if not isinstance(evaluation, schema.Harness):
        return scores(family, model, tasks, micro, device, stage, score_cache=score_cache)
    options = (evaluation.tasks, evaluation.include_path, evaluation.shots, evaluation.samples)
    with distributed.single_process():
        return {stage: harness_scores(model, folder, device, *options, micro)}


def open_checkpoint(family: Family, checkpoint: Path, device: torch.device, kernel: str) -> nn.Module:
    """Opens the model of a checkpoint. Transformers dequantizes it if it can; otherwise the linears stay packed."""
    with distributed.single_process():
        if kernel == "dequantize" and layout_of(checkpoint).plain:
            return load_model(family, checkpoint, device)
        return load(checkpoint, str(device), kernel, torch.float32)


def score_parts(
    job: Job,
    model: nn.Module,
    models: SuiteModels,
    tasks: list[ScoredTask],
    score_cache: Callable[[str], ScoreCache] = lambda stage: compute,
    micro: MicroBatcher | None = None,
) -> Scores:
    """Scores the stages `base` and `experts`, each expert on its own task. May overwrite the model's merged tensors."""

    def become_expert(task: ScoredTask) -> None:
        copy_into(model, models.source.model(task.name))

    micro = micro or micro_batcher(job.evaluation.batch_size)
    by_stage = score(job, model, tasks, "base", models.base.path, score_cache("base"), micro)
    if "experts" in job.evaluation.stages and distributed.is_main():
        by_stage |= scores(
            job.family, model, tasks, micro, job.device, "experts", become_expert, score_cache("experts")
        )
    return by_stage
