"""`epmq run`: merge, calibrate, quantize, pack, score, report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from epmq_cli.commands.error_report import log_errors
from epmq_cli.commands.hydra_app import quiet_libraries
from epmq_cli.config import instantiate, schema
from epmq_cli.errors import RunError
from epmq_cli.pipeline import unfinished
from epmq_cli.pipeline.job import make_job
from epmq_cli.runtime import distributed, memory
from epmq_cli.runtime.console import say
from epmq_cli.store.run_lock import RESULTS, alone

if TYPE_CHECKING:
    import torch
    from torch import nn

    from epmq_cli.data.batching import Batch
    from epmq_cli.data.microbatch import MicroBatcher
    from epmq_cli.evaluate.score import ScoredTask, Scores
    from epmq_cli.merge.engine import SuiteModels
    from epmq_cli.pipeline.cached_steps import CachedSteps
    from epmq_cli.pipeline.job import Job
    from epmq_cli.pipeline.task_processors import Processors
    from epmq_cli.report.stage_timer import Stages

CHECKPOINT, METRICS = RESULTS


@hydra.main(version_base="1.3", config_path=str(instantiate.conf_dir()), config_name="run")
@log_errors
def main(cfg: DictConfig) -> None:
    """One job, or one of each job of a sweep, in the run folder that Hydra made."""
    hydra_config = HydraConfig.get()
    chosen = hydra_config.runtime.choices.items()
    choices = {group: str(name) for group, name in chosen if "/" not in group and name is not None}
    folder, overrides = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
    sweep = Path(hydra_config.sweep.dir) if hydra_config.mode == RunMode.MULTIRUN else None
    if distributed.is_main():
        unfinished.begin(sweep or folder)
    if sweep is not None and _done(folder, cfg):
        say(f"{folder} holds the results of this job already")
        return
    run(cfg, folder, unfinished.typed(overrides), choices)


def _done(folder: Path, cfg: DictConfig) -> bool:
    """Whether a job of a sweep is done, as the first of several processes says, in whose folder it is."""
    if distributed.world_size() > 1:
        distributed.init(instantiate.device_of(cfg.device))
    return distributed.broadcast(distributed.is_main() and unfinished.done(folder, cfg))


def run(cfg: DictConfig, folder: Path, overrides: list[str], choices: dict[str, str]) -> None:
    """Does the job of the config, or goes on with it; afterwards the folder holds `checkpoint/` and `metrics.json`."""
    quiet_libraries()
    memory.keep_freed()
    from torch import OutOfMemoryError

    with alone(folder):
        try:
            _run(cfg, folder, overrides, choices)
        except OutOfMemoryError as error:
            raise RunError(
                f"the device has no room for calib.batch_size={cfg.calib.batch_size} samples at a time; lower it, as "
                "of several processes none tries smaller batches by itself, or use device=cpu"
                if distributed.world_size() > 1
                else "the device has no room for the model; use one with more memory, or device=cpu"
            ) from error


def _run(cfg: DictConfig, folder: Path, overrides: list[str], choices: dict[str, str]) -> None:
    from epmq_cli.checkpoint.load import kernels
    from epmq_cli.evaluate.score import micro_batcher
    from epmq_cli.pipeline import steps as steps
    from epmq_cli.pipeline.progress import close, refuse_results
    from epmq_cli.report import metrics_json, table
    from epmq_cli.report.stage_timer import Stages

    refuse_results(folder)
    instantiate.check_complete(cfg, "run")
    distributed.init(instantiate.device_of(cfg.device))
    job, checkpoint = make_job(cfg), folder / CHECKPOINT
    say(f"{table.counted(len(job.suite.members), 'expert')}, on {job.device}, results go to {table.near(folder)}")
    stages, scoring = Stages(job.device), micro_batcher(job.evaluation.batch_size)
    tasks, scores, measured = _made(cfg, job, folder, choices, stages, scoring)
    if not distributed.is_main():
        return
    memory.give_back()  # what is scored is read from the disk, and needs the room of what was made
    with stages.stage("score quantized"):
        if "quantized" in job.evaluation.stages:
            model = steps.open_checkpoint(job.family, checkpoint, job.device, job.evaluation.kernel)
            scores |= steps.score(job, model, tasks, "quantized", checkpoint, micro=scoring)
            measured["kernels"] = kernels(model)
    measured["events"]["eval_batches_halved"] = scoring.halved
    measured |= {"scores": metrics_json.by_task(scores, job.suite.metrics), "stages": stages.records}
    resolved = OmegaConf.to_container(cfg, resolve=True)
    metrics_json.write_json(folder / METRICS, metrics_json.metrics("run", overrides, resolved, job.device, measured))
    close(folder)
    title = f"{job.suite.name}: {choices['merge']}, {choices['guidance']}, {choices['quant']}"
    table.show_run(measured, title, folder)


@dataclass(frozen=True)
class _Inputs:
    """What a run starts from: the opened suite, the base model and its type, what is cached, and each task's test
    samples, calibration batches and, where it is not the base's, tokenizer or image processor."""

    models: SuiteModels
    model: nn.Module
    dtype: torch.dtype
    shared: CachedSteps
    processors: Processors
    tasks: list[ScoredTask]
    drawn: dict[str, list[Batch]]


def _read(job: Job, folder: Path, cache: Any) -> _Inputs:
    """Opens models and data, and the cache as `cache` of the config says; all that can be refused is refused here,
    before anything is computed."""
    from epmq_cli.calibrate.self_check import check_blocks
    from epmq_cli.pipeline import steps as steps
    from epmq_cli.pipeline.cached_steps import CachedSteps, open_cache
    from epmq_cli.pipeline.task_processors import calibration_samples, task_processors

    opened_cache = open_cache(cache)
    models, model, dtype = steps.open_models(job, folder)
    shared = CachedSteps(opened_cache, job, models, dtype)
    processors = task_processors(job.family, models, job.suite.members, calibration_samples(job.seed, job.family))
    tasks = steps.prepare_tasks(job, model, models, processors)
    drawn = steps.calibration_batches(job, models.base.path, processors)
    check_blocks(model, job.family, drawn)
    if (kind := models.base.config.get("model_type")) not in job.family.model_types:
        say(f"base: epmq is not tested with models of type {kind}; the self-check found nothing unknown in it")
    return _Inputs(models, model, dtype, shared, processors, tasks, drawn)


def _made(
    cfg: DictConfig, job: Job, folder: Path, choices: dict[str, str], stages: Stages, scoring: MicroBatcher
) -> tuple[list[ScoredTask], Scores, dict[str, Any]]:
    """Writes `checkpoint/`; gives the tasks with the heads that suit it, the scores of what came before, and what
    metrics.json says of it all. Models, samples and moments end with this function."""
    from epmq_cli.calibrate.reference_weights import copy_into
    from epmq_cli.checkpoint.open_clip import also_open_clip, dequantized_entries
    from epmq_cli.checkpoint.write import Contents, write_checkpoint
    from epmq_cli.evaluate.chance import check_experts
    from epmq_cli.pipeline import calibration as guide
    from epmq_cli.pipeline import record
    from epmq_cli.pipeline import steps as steps
    from epmq_cli.pipeline.keys import run_key
    from epmq_cli.pipeline.progress import opened, refuse_results
    from epmq_cli.pipeline.task_processors import save_processors

    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    scores: Scores = {}
    micro, checkpoint = guide.micro_batcher(job), folder / CHECKPOINT
    with stages.stage("read"):
        read = _read(job, folder, cfg.cache)
        models, model, shared, tasks = read.models, read.model, read.shared, read.tasks
        files = shared.files if distributed.is_main() else {}
        state = opened(folder, run_key(resolved, files, read.drawn, job.device), job.resume)
        refuse_results(folder, state)
    for name, counted in (("batches_halved", micro), ("eval_batches_halved", scoring)):
        counted.halved, counted.keep = state.count(name), partial(state.keep_count, name)
    scored = state.part(distributed.broadcast(shared.scores_key(tasks) if distributed.is_main() else None))
    with stages.stage("score base and experts"):
        scores |= scored.value(
            "parts", lambda: steps.score_parts(job, model, models, tasks, shared.score_cache, scoring)
        )
    checks = check_experts(tasks, scores, model)
    with stages.stage("teach"):
        taught = guide.run_teachers(job, model, models.source, read.drawn, state, shared.taught, micro)
    with stages.stage("merge"):
        data = steps.merge_data(job, model, models.source, taught.batches, tasks, micro)
        copy_into(model, merged := shared.merged(data))
    with stages.stage("score merged"):
        known = (models.base.path, shared.score_cache("merged"), scoring)
        scores |= scored.value("merged", lambda: steps.score(job, model, tasks, "merged", *known))
    with stages.stage("calibrate and quantize"):
        calibrated = guide.calibrate(job, model, taught.batches, tasks, merged, folder, state, micro)
        tasks = guide.solve_heads(job, model, taught, tasks, calibrated.guidance, micro)
    state.begin_packing()
    if not distributed.is_main():
        return tasks, scores, {}
    with stages.stage("pack"):
        contents = Contents(
            exporter=job.exporter,
            model=model,
            weights=calibrated.walk.weights,
            dequantize=job.family.dequantize_on_load,
            heads={task.name: task.head for task in tasks},
            base=models.base.path,
            texts=record.texts(job, model, resolved, choices, calibrated.walk, tasks, read.processors),
            save_others=also_open_clip(
                job.exporter.open_clip,
                partial(save_processors, models.base.path, read.processors, job.family.reads),
                partial(dequantized_entries, model, calibrated.walk.weights, read.dtype),
            ),
            dtype=read.dtype,
            changes=models.ties.changes,
        )
        if not checkpoint.exists():
            write_checkpoint(checkpoint, contents, schema.bytes_of("pack.shard_size", job.exporter.shard_size))
    measured = {"seed": job.seed, **record.measured(calibrated.walk), "guidance": guide.summary(job, calibrated)}
    measured |= {"bytes": record.sizes(contents, checkpoint), "resumed": state.starts, "cache": shared.use}
    measured["events"]["batches_halved"] = micro.halved
    return tasks, scores, measured | {"expert_checks": {task: asdict(found) for task, found in checks.items()}}
