"""The steps of `epmq run` and `epmq eval`. Each is a function of the results of earlier steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.merge_data import ExpertMeasurements
from epmq_cli.checkpoint.engine import Base
from epmq_cli.checkpoint.engines import check_engine_model
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.checkpoint.load import load, needs_own_loader
from epmq_cli.checkpoint.open_clip import check_base
from epmq_cli.checkpoint.rounded_inputs import input_formats, round_inputs
from epmq_cli.config import schema
from epmq_cli.config.schema import GENERATE
from epmq_cli.data.answers import check_answers, unmarked
from epmq_cli.data.batching import Batch, Batches, split
from epmq_cli.data.chats import has_chats
from epmq_cli.data.mixture import Mixture
from epmq_cli.data.sampling import batches, check_some, draw, sequences, task_seed
from epmq_cli.data.suite import Task
from epmq_cli.errors import DataError
from epmq_cli.evaluate.score import ScoredTask, Scores
from epmq_cli.families.family import Family, linear_shapes, load_model, outside_blocks
from epmq_cli.families.heads.classifier import check_single_label
from epmq_cli.families.inputs import check_inputs
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.merge.given import given_path
from epmq_cli.merge.slices import sliced
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.suite_models import SuiteModels, fit_source, written_dtype
from epmq_cli.models.processor_files import ProcessorFiles
from epmq_cli.models.processor_folder import Processor
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline.budget import check_budget
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import Job
from epmq_cli.pipeline.preflight import (
    check_described,
    check_groups,
    check_kernel,
    check_lengths,
    check_parts,
    rounded,
)
from epmq_cli.pipeline.scored_tasks import EvaluationData, head_names
from epmq_cli.pipeline.task_processors import Processors
from epmq_cli.quantize.mixed_precision import formats_of
from epmq_cli.runtime import distributed
from epmq_cli.runtime.block_offload import offload_blocks
from epmq_cli.runtime.console import log
from epmq_cli.runtime.disk_offload import Disk
from epmq_cli.runtime.progress import track


def open_models(job: Job, folder: Path | None = None) -> tuple[SuiteModels, nn.Module, torch.dtype]:
    """Opens the suite and the base model. Also returns the type of the scales and of the tensors that stay dense.

    The model is where `calib.student` says; its files are in the folder. It computes in float32 with
    weights rounded to that type. Buffers that are not stored, such as rotary frequencies, are not rounded.
    """
    models = SuiteModels(job.suite, job.family, given=given_path(job.merge), transform=job.transform)
    if job.exporter.open_clip:
        check_base(models.base)
    ProcessorFiles(models.base.path)  # fails early if transformers cannot load them
    dtype = written_dtype(models.source, job.exporter.dtype)
    check_lengths(job.suite, job.family, models.base.path)
    described = models.base.config if job.transform != "none" else None
    model = _base_model(job, models, dtype, folder, described)
    formats = formats_of(job.quantizer)
    check_groups(model, job.family, formats)
    linears = dict(linear_shapes(model, job.family))
    job.exporter.check_linears(linears, model, formats)
    check_engine_model(job.exporter, job.family, linears, formats, Base(models.base.config, models.base.path))
    check_kernel(model, job.family, formats if job.exporter.packs else [], job.evaluation, job.device)
    if not sliced(job.merge):
        check_budget(job, model, dtype)
    return models, model, dtype


def stacked_model(job: Job, models: SuiteModels, dtype: torch.dtype, folder: Path | None = None) -> nn.Module:
    """The model for a merge that changes the layers, without its weights. `models`: the result of `stacked`."""
    model = _base_model(job, models, dtype, folder, models.base.config)
    check_budget(job, model, dtype)
    return model


def _base_model(
    job: Job,
    models: SuiteModels,
    dtype: torch.dtype,
    folder: Path | None,
    described: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The base in the shape of the result, where `calib.student` says. `described`: see `load_model`."""
    # float32 unless the files have this type: the config may name a narrower one
    opened_dtype = dtype if dtype == models.source.main_dtype else torch.float32
    model = fit_source(load_model(job.family, models.base.path, _place(job, folder), opened_dtype, described), models)
    _offload(job, model)
    check_parts(model, job.family)
    check_described(model, job.family, models)
    if models.rewritten:
        copy_into(model, ((name, models.source.base(name)) for name in models.source.names))
    own = model.state_dict().items()
    copy_into(model, ((name, rounded(name, tensor, dtype)) for name, tensor in own if tensor.is_floating_point()))
    return model


def _place(job: Job, folder: Path | None) -> torch.device | Disk:
    """Where the weights of a model are: `calib.student`."""
    student = job.calib.student
    return Disk(folder) if student == "disk" else torch.device("cpu") if student == "cpu" else job.device


def _offload(job: Job, model: nn.Module) -> None:
    """Lets a model that is not in the memory of the GPU run there, block by block."""
    if job.device.type != "cpu" and job.calib.student != "memory":
        blocks = [block.module for block in job.family.blocks(model)]
        offload_blocks(model, blocks, job.device, outside_blocks(model, job.family))


def merge_data(
    context: RunContext, model: nn.Module, source: MergeSource, batches: Batches, tasks: Sequence[ScoredTask]
) -> ExpertMeasurements | None:
    """The data on which the merge method measures the experts: calibration batches with the experts' answers, and the
    heads of the tasks. None if the method needs no data. Measuring may overwrite the model's merged tensors."""
    job = context.job
    if not job.merge.needs:
        return None
    memory = schema.bytes_of("calib.memory", job.calib.memory) // distributed.world_size()
    heads = {task.name: task.head for task in tasks}
    return ExpertMeasurements(model, job.family, source, batches, heads, context.micro, memory, context.folder)


def prepare_tasks(
    job: Job, base_model: nn.Module, models: SuiteModels, processors: Processors | None = None
) -> list[ScoredTask]:
    """The tasks with their test samples and heads. The base model computes the heads, or the experts contain them.
    `processors`: the result of `task_processors`."""
    prepared, family = [], job.family
    scored = schema.scores_samples(job.evaluation)
    data = EvaluationData(family, models.base.path, job.evaluation.samples if scored else 0, job.seed)
    for task in track(job.suite.members, "read tasks"):
        expert = models.experts[task.name]
        with torch.inference_mode():
            head = family.head(base_model, models.base.path, task, expert, job.device)
        if scored and family.heads == "own":
            check_single_label(expert, task.name)
        names = head_names(family, models, task, head, scored)
        prepared.append(data.scored_task(task, head, names, (processors or {}).get(task.name)))
    return prepared


def calibration_batches(
    job: Job, base: Path, processors: Processors | None = None, scored: Sequence[ScoredTask] = ()
) -> dict[str, list[Batch]]:
    """Each task's calibration batches on the device, limited to this process's share. `processors`: the result of
    `task_processors`. `scored`: the tasks with their test samples; epmq warns if these are of another kind."""
    warn_of_shared_data(job)
    talks = {task.name: task.talks for task in scored}
    size, drawn, marked = job.calib.batch_size, {}, {}
    for task in track(job.suite.members, "read calibration data"):
        own = (processors or {}).get(task.name)
        if isinstance(job.family.tasks, LanguageModel) and job.calib.source == GENERATE:
            seed = task_seed(job.seed, task.name)
            starts = split(job.family.tasks.starts(base, task, job.calib.samples, seed, own), size)
            own_starts = [starts[number] for number in _own_batches(task.name, len(starts))]
            drawn[task.name] = [{name: x.to(job.device) for name, x in batch.items()} for batch in own_starts]
            continue
        if isinstance(job.family.tasks, LanguageModel):
            tokens_of = partial(_tokens, job, base, task, own, talks.get(task.name))
            samples = sequences(task, tokens_of, job.calib.samples, job.seed)
            check_some(task.name, "train", len(samples))
            if job.guidance.prompt_weight != 1:
                samples, marked[task.name] = unmarked(samples)
        else:
            samples = draw(task, job.calib.samples, job.seed)
            check_inputs(job.family, task.name, samples.inputs)
            samples = job.family.tasks.calibrating(task, samples, job.calib.samples).by_length()
        places = [size * number for number in _own_batches(task.name, math.ceil(len(samples) / size))]
        drawn[task.name] = list(batches(samples, job.family.collate(base, task, own), size, job.device, places))
    check_answers(marked)
    return drawn


def warn_of_shared_data(job: Job) -> None:
    """Warns if all experts of language models calibrate on the same data, on which they hardly differ."""
    first, *others = job.suite.members
    own_text = not isinstance(job.family.tasks, LanguageModel) or job.calib.source == GENERATE
    if not own_text and others and all(task.data == first.data for task in others):
        log.warning(
            "all tasks calibrate on the same data, which tells little about what each expert has learned; set "
            "suite.tasks.%s.data and that of the others to data of their tasks, or calib.source=generate",
            first.name,
        )


def _own_batches(task: str, count: int) -> Sequence[int]:
    """The numbers of this process's calibration batches of a task, out of `count`; DataError if it has none."""
    numbers = distributed.rank_slice(range(count))
    if not numbers:
        raise DataError(
            f"task {task} has {count} calibration batches, too few for {distributed.world_size()} processes; lower "
            "calib.batch_size or start fewer processes"
        )
    return numbers


def _tokens(
    job: Job, folder: Path, task: Task, processor: Processor | None, talks: bool | None, documents: Sequence[Any]
) -> list[Tensor]:
    """The tokens of documents. Warns if they are not conversations and those that are scored are (`talks`), or the
    reverse."""
    check_inputs(job.family, task.name, documents)
    if talks is not None and talks != has_chats(documents) and not isinstance(task.data, Mixture):
        own, scored = ("texts", "conversations") if talks else ("conversations", "texts")
        log.warning(
            "task %s calibrates on %s and is scored on %s, so calibration fits other inputs than those of the score; "
            "give splits of one kind in suite.tasks.%s.data",
            *(task.name, own, scored, task.name),
        )
    language, answers = job.family.tasks, job.guidance.prompt_weight != 1
    assert isinstance(language, LanguageModel)
    if task.packing:
        return [language.tokens(folder, documents, processor, answers)]
    return language.each(folder, documents, processor, answers)


def open_result(job: Job, checkpoint: Path, folder: Path | None = None) -> nn.Module:
    """`open_checkpoint` for the checkpoint of a job; dequantized, the model is where `calib.student` says."""
    model = open_checkpoint(job.family, checkpoint, job.device, job.evaluation, _place(job, folder))
    if _dequantizes(checkpoint, job.evaluation):
        _offload(job, model)
    return model


def _dequantizes(checkpoint: Path, evaluation: schema.Evaluation) -> bool:
    whole = layout_of(checkpoint).plain and not needs_own_loader(checkpoint)
    return evaluation.kernel == "dequantize" and whole


def open_checkpoint(
    family: Family,
    checkpoint: Path,
    device: torch.device,
    evaluation: schema.Evaluation,
    place: torch.device | Disk | None = None,
) -> nn.Module:
    """Opens the model of a checkpoint. Transformers dequantizes it if it can; otherwise the linears stay packed. They
    round their inputs if engines do and `eval.round_inputs` is set. `place`: where dequantized weights are; None for
    the device."""
    with distributed.single_process():
        if _dequantizes(checkpoint, evaluation):
            model = load_model(family, checkpoint, place or device)
        else:
            model = load(checkpoint, str(device), evaluation.kernel, torch.float32)
    if evaluation.round_inputs:
        round_inputs(model, input_formats(checkpoint))
    return model


def score(context: RunContext, model: nn.Module, tasks: list[ScoredTask], stage: str, folder: Path) -> Scores:
    """The scores of one stage; empty if `eval.stages` lacks it. Only the main process scores. `folder` contains the
    tokenizer."""
    if stage not in context.job.evaluation.stages or not distributed.is_main():
        return {}
    return context.scorer.scores(model, tasks, stage, folder, context.score_cache(stage))


def score_parts(context: RunContext, model: nn.Module, models: SuiteModels, tasks: list[ScoredTask]) -> Scores:
    """Scores the stages `base` and `experts`, each expert on its own task. May overwrite the model's merged tensors."""

    def become_expert(task: ScoredTask) -> None:
        copy_into(model, models.source.model(task.name))

    folder, stage = models.base.path, "experts"
    by_stage = score(context, model, tasks, "base", folder)
    if stage in context.job.evaluation.stages and distributed.is_main():
        by_stage |= context.scorer.scores(model, tasks, stage, folder, context.score_cache(stage), become_expert)
    return by_stage
