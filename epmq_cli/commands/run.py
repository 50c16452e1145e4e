"""`epmq run`: merge, calibrate, quantize, pack, score, report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from epmq_cli.commands.error_report import log_errors
from epmq_cli.commands.hydra_app import quiet_libraries, tell_loading
from epmq_cli.config import instantiate, schema
from epmq_cli.errors import RunError
from epmq_cli.pipeline import unfinished
from epmq_cli.runtime import distributed, memory
from epmq_cli.runtime.console import say
from epmq_cli.store.run_lock import RESULTS, exclusive_lock

if TYPE_CHECKING:
    import torch
    from torch import nn

    from epmq_cli.calibrate.merge_data import ExpertMeasurements
    from epmq_cli.calibrate.progress import WalkResult
    from epmq_cli.checkpoint.model_card import ModelCard
    from epmq_cli.checkpoint.write import Contents
    from epmq_cli.data.batching import Batch
    from epmq_cli.evaluate.score import ScoredTask, Scores
    from epmq_cli.merge.engine import LazyMerge
    from epmq_cli.merge.stacked import StackedMerge
    from epmq_cli.merge.suite_models import SuiteModels
    from epmq_cli.pipeline.cached_steps import CachedSteps
    from epmq_cli.pipeline.context import RunContext
    from epmq_cli.pipeline.job import Job
    from epmq_cli.pipeline.progress import RunProgress
    from epmq_cli.pipeline.task_processors import Processors

CHECKPOINT, METRICS = RESULTS


@hydra.main(version_base="1.3", config_path=str(instantiate.conf_dir()), config_name="run")
@log_errors
def main(cfg: DictConfig) -> None:
    """Runs one job, or one job of a sweep, in the run folder that Hydra created."""
    hydra_config = HydraConfig.get()
    chosen = hydra_config.runtime.choices.items()
    choices = {
        group: str(name) for group, name in chosen if "/" not in group and name is not None and group != "tracking"
    }
    folder, overrides = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
    sweep = Path(hydra_config.sweep.dir) if hydra_config.mode == RunMode.MULTIRUN else None
    if distributed.is_main():
        unfinished.begin(sweep or folder)
    if sweep is not None and _done(folder, cfg):
        say(f"{folder} already contains the results of this job")
        return
    run(cfg, folder, unfinished.typed(overrides), choices)


def _done(folder: Path, cfg: DictConfig) -> bool:
    """Whether a job of a sweep is done. The main process decides, because only it writes to the folder."""
    if distributed.world_size() > 1:
        distributed.init(instantiate.device_of(cfg.device))
    return distributed.broadcast(distributed.is_main() and unfinished.done(folder, cfg))


def run(cfg: DictConfig, folder: Path, overrides: list[str], choices: dict[str, str]) -> None:
    """Runs or resumes the job of a config. Writes `checkpoint/`, `metrics.json` and `report.html` into the folder."""
    memory.keep_freed()
    with exclusive_lock(folder):
        job = _checked(cfg, folder)
        tell_loading()
        quiet_libraries()
        from torch import OutOfMemoryError

        try:
            _run(cfg, job, folder, overrides, choices)
        except OutOfMemoryError as error:
            raise RunError(
                f"the device does not have enough memory for calib.batch_size={cfg.calib.batch_size}; lower it, "
                "because a run of several processes does not halve its batches, or use device=cpu"
                if distributed.world_size() > 1
                else "the device does not have enough memory for the model; use calib.student=cpu or a larger device"
            ) from error


def _checked(cfg: DictConfig, folder: Path) -> Job:
    """The job of the config, after all checks that do without torch, which takes seconds to import."""
    from epmq_cli.pipeline.input_checks import check_inputs
    from epmq_cli.pipeline.job import read_job

    unfinished.refuse_results(folder)
    instantiate.check_complete(cfg, "run")
    schema.cache_bytes(cfg.cache)
    job = read_job(cfg)
    check_inputs(job)
    return job


def _run(cfg: DictConfig, job: Job, folder: Path, overrides: list[str], choices: dict[str, str]) -> None:
    from epmq_cli.checkpoint.load import kernels
    from epmq_cli.checkpoint.model_card import write_scores
    from epmq_cli.pipeline import steps as steps
    from epmq_cli.pipeline.context import RunContext
    from epmq_cli.pipeline.job import check_device
    from epmq_cli.pipeline.progress import close
    from epmq_cli.report import metrics_json, table

    distributed.init(job.device)
    check_device(job)
    checkpoint = folder / CHECKPOINT
    say(f"{table.counted(len(job.suite.members), 'expert')}, on {job.device}, results go to {table.near(folder)}")
    context = RunContext.of(job, folder)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    tasks, scores, measured, card = _make_checkpoint(context, resolved, choices, overrides)
    if card is None:
        return
    memory.give_back()  # scoring loads the checkpoint from disk and needs the memory
    with context.stages.stage("score quantized"):
        if "quantized" in job.evaluation.stages:
            model = steps.open_result(job, checkpoint, folder)
            scores |= steps.score(context, model, tasks, "quantized", checkpoint)
            measured["kernels"] = kernels(model)
    measured["events"]["eval_batches_halved"] = context.scorer.micro.halved
    measured |= {"scores": metrics_json.by_task(scores, job.suite.metrics), "stages": context.stages.records}
    from epmq_cli.report.page.page import write_report  # here, because a run must not start slower
    from epmq_cli.report.page.pictures import score_pictures

    write_scores(checkpoint, card, measured["scores"], score_pictures(measured["scores"]))
    content = metrics_json.metrics("run", overrides, resolved, job.device, measured)
    metrics_json.write_json(folder / METRICS, content)
    close(folder)
    write_report(folder, content)
    title = f"{job.suite.name}: {choices['merge']}, {choices['guidance']}, {choices['quant']}"
    table.show_run(measured, title, folder)


@dataclass(frozen=True)
class _Inputs:
    """What a run opens: the suite, the base model and its type, the cached steps, the progress, and each task's test
    samples, calibration batches and own tokenizer or image processor. `stacked`: the suite with the layers of the
    result and the merge, if it changes the layers."""

    models: SuiteModels
    model: nn.Module
    dtype: torch.dtype
    cache: CachedSteps
    progress: RunProgress
    processors: Processors
    tasks: list[ScoredTask]
    drawn: dict[str, list[Batch]]
    stacked: tuple[SuiteModels, StackedMerge] | None


def _read(resolved: dict[str, Any], job: Job, folder: Path) -> _Inputs:
    """Opens models, data, cache and progress. All checks happen here, before anything is computed."""
    from epmq_cli.calibrate.producer_check import check_producers
    from epmq_cli.calibrate.self_check import check_blocks
    from epmq_cli.data.batching import without
    from epmq_cli.merge.slices import sliced
    from epmq_cli.merge.stacked import stacked
    from epmq_cli.pipeline import steps as steps
    from epmq_cli.pipeline.cached_steps import CachedSteps, open_cache
    from epmq_cli.pipeline.keys import run_key
    from epmq_cli.pipeline.kv_cache import check_cache
    from epmq_cli.pipeline.progress import opened
    from epmq_cli.pipeline.task_processors import calibration_samples, task_processors
    from epmq_cli.quantize.mixed_precision import transforms

    opened_cache = open_cache(resolved["cache"])
    models, model, dtype = steps.open_models(job, folder)
    layers = stacked(models, slices, dtype, job.device) if (slices := sliced(job.merge)) else None
    cache = CachedSteps(opened_cache, job, models, dtype)
    own_samples = calibration_samples(job.seed, job.family, job.calib)
    processors = task_processors(job.family, models, job.suite.members, own_samples)
    tasks = steps.prepare_tasks(job, model, models, processors)
    drawn = steps.calibration_batches(job, models.base.path, processors, tasks)
    inputs = {task: [without(batch, job.family.tasks.consumed) for batch in group] for task, group in drawn.items()}
    check_blocks(model, job.family, inputs)
    check_cache(job, model, inputs)
    if transforms(job.quantizer):
        check_producers(model, job.family, inputs)
    if (kind := models.base.config.get("model_type")) not in job.family.model_types:
        say(f"base: epmq is not tested with models of type {kind}; this model passes the self-check")
    key = run_key(resolved, cache.files if distributed.is_main() else {}, drawn, job.device)
    progress = opened(folder, key, job.resume)
    unfinished.refuse_results(folder, progress)
    return _Inputs(models, model, dtype, cache, progress, processors, tasks, drawn, layers)


def _make_checkpoint(
    context: RunContext, resolved: dict[str, Any], choices: dict[str, str], overrides: list[str]
) -> tuple[list[ScoredTask], Scores, dict[str, Any], ModelCard | None]:
    """Writes `checkpoint/`. Returns the tasks with their solved heads, the scores of base, experts and merge, the
    entries of metrics.json, and the model card, None in other processes than the first. `resolved`: the config. Models,
    samples and moments are freed on return."""
    from epmq_cli.checkpoint.model_card import NAME as CARD
    from epmq_cli.checkpoint.write import RECORD, write_checkpoint
    from epmq_cli.evaluate.chance import check_experts
    from epmq_cli.evaluate.score import restored
    from epmq_cli.pipeline import calibration as guide
    from epmq_cli.pipeline import record, steps
    from epmq_cli.pipeline.agreement import Agreement
    from epmq_cli.pipeline.kv_cache import measured_cache
    from epmq_cli.pipeline.refinement import Refiner

    job, checkpoint, stage = context.job, context.folder / CHECKPOINT, context.stages.stage
    with stage("read"):
        inputs = _read(resolved, job, context.folder)
        models, model, tasks, cache = inputs.models, inputs.model, inputs.tasks, inputs.cache
        context = context.resumed(inputs.progress, cache)
    scored = context.progress.part(distributed.broadcast(cache.scores_key(tasks) if distributed.is_main() else None))
    with stage("score base and experts"):
        scores = restored(scored.value("parts", lambda: steps.score_parts(context, model, models, tasks)))
    checks = check_experts(tasks, scores, model)
    with stage("teach"):
        teachers = guide.run_teachers(context, model, models.source, inputs.drawn)
        agreement = Agreement.of(context, model, [] if inputs.stacked else tasks, models.source)
    with stage("merge"):
        data = steps.merge_data(context, model, models.source, teachers.batches, tasks)
        inputs, merged = _merged(context, inputs, data)
        models, model, base = inputs.models, inputs.model, inputs.models.base.path
    with stage("score merged"):
        scores |= restored(scored.value("merged", lambda: steps.score(context, model, tasks, "merged", base)))
        agreement.measure("merged", tasks)
    with stage("refine"):
        refiner = Refiner(context, model, teachers.batches, tasks, merged.source)
        refined = refiner.dense(merged)
    with stage("calibrate and quantize"):
        calibrated = guide.calibrate(refined.context, model, refined.batches, tasks, refined.anchor)
        refiner.packed(calibrated.walk, inputs.dtype)
        tasks = guide.solve_heads(context, model, teachers, tasks, calibrated.guidance)
        agreement.measure("quantized", tasks, calibrated.walk.weights)
        cached = measured_cache(context, model, teachers.batches)
    context.progress.begin_packing()
    if not distributed.is_main():
        return tasks, scores, {}, None
    with stage("pack"):
        processors = inputs.processors
        card = record.card(job, (model, base), choices, overrides, calibrated.walk, processors)
        texts = {RECORD: record.record_text(job, resolved, choices, tasks, processors), CARD: card.text()}
        contents = replace(_contents(job, inputs, calibrated.walk, tasks, texts), cache=cached)
        if not checkpoint.exists():
            write_checkpoint(checkpoint, contents, schema.bytes_of("pack.shard_size", job.exporter.shard_size))
    measured = {"seed": job.seed, **record.measured(calibrated.walk), "guidance": guide.summary(job, calibrated)}
    measured |= {"bytes": record.sizes(contents, checkpoint), "resumed": context.progress.starts, "cache": cache.use}
    measured["events"]["batches_halved"] = context.micro.halved
    expert_checks = {task: asdict(check) for task, check in checks.items()}
    measured |= {"agreement": agreement.entry, "expert_checks": expert_checks, **refined.entries, **refiner.entries}
    return tasks, scores, measured, card


def _merged(context: RunContext, inputs: _Inputs, data: ExpertMeasurements | None) -> tuple[_Inputs, LazyMerge]:
    """The inputs with the merged model in place of the base, and the merge."""
    from torch import nn

    from epmq_cli.models.weights import copy_into
    from epmq_cli.pipeline import steps as steps

    if inputs.stacked is None:
        merged = inputs.cache.merged(data)
    else:
        models, merged = inputs.stacked
        merged = inputs.cache.merged(data, merged)
        nn.Module.to(inputs.model, "meta")  # frees the base model
        model = steps.stacked_model(context.job, models, inputs.dtype, context.folder)
        inputs = replace(inputs, models=models, model=model)
    copy_into(inputs.model, merged)
    return inputs, merged


def _contents(job: Job, inputs: _Inputs, walk: WalkResult, tasks: list[ScoredTask], texts: dict[str, str]) -> Contents:
    """The contents of `checkpoint/`. `texts`: the model card and the record, by file name."""
    from epmq_cli.checkpoint.gguf.exporter import also_gguf
    from epmq_cli.checkpoint.open_clip import also_open_clip, dequantized_entries
    from epmq_cli.checkpoint.write import Contents
    from epmq_cli.pipeline.task_processors import save_processors

    base, entries = inputs.models.base.path, partial(dequantized_entries, inputs.model, walk.weights, inputs.dtype)
    processors = partial(save_processors, job.family, base, inputs.processors)
    others = also_open_clip(job.exporter.open_clip, processors, entries)
    return Contents(
        exporter=job.exporter,
        model=inputs.model,
        weights=walk.weights,
        dequantize=job.family.dequantize_on_load,
        heads={task.name: task.head for task in tasks},
        base=base,
        texts=texts,
        save_others=also_gguf(job.exporter.gguf, job.suite.name, others),
        dtype=inputs.dtype,
        changes=inputs.models.ties.changes,
    )
