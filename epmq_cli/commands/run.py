"""`epmq run`: merge, calibrate, quantize, pack, score, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from epmq_cli import allocator, config, ranks
from epmq_cli.commands.app import guarded, quiet_libraries
from epmq_cli.console import say
from epmq_cli.errors import RunError
from epmq_cli.resume import unfinished
from epmq_cli.resume.lock import alone


@hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="run")
@guarded
def main(cfg: DictConfig) -> None:
    """One job, or one of each job of a sweep, in the run folder that Hydra made."""
    hydra_config = HydraConfig.get()
    chosen = hydra_config.runtime.choices.items()
    choices = {group: str(name) for group, name in chosen if "/" not in group and name is not None}
    folder, overrides = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
    sweep = Path(hydra_config.sweep.dir) if hydra_config.mode == RunMode.MULTIRUN else None
    if ranks.first():
        unfinished.begin(sweep or folder)
    if sweep is not None and unfinished.done(folder, cfg):
        say(f"{folder} holds the results of this job already")
        return
    run(cfg, folder, unfinished.typed(overrides), choices)


def run(cfg: DictConfig, folder: Path, overrides: list[str], choices: dict[str, str]) -> None:
    """Does the job of the config, or goes on with it; afterwards the folder holds `checkpoint/` and `metrics.json`."""
    quiet_libraries()
    allocator.keep_freed()
    from torch import OutOfMemoryError

    with alone(folder):
        try:
            _run(cfg, folder, overrides, choices)
        except OutOfMemoryError as error:
            raise RunError(
                f"the device has no room for calib.batch_size={cfg.calib.batch_size} samples at a time; lower it, as "
                "of several processes none tries smaller batches by itself, or use device=cpu"
                if ranks.count() > 1
                else "the device has no room for the model; use one with more memory, or device=cpu"
            ) from error


def _run(cfg: DictConfig, folder: Path, overrides: list[str], choices: dict[str, str]) -> None:
    from epmq_cli import calibration as guide
    from epmq_cli import pipeline as steps
    from epmq_cli.cache import open_cache
    from epmq_cli.calibrate.reference import install
    from epmq_cli.checkpoint.pack import Contents, write_checkpoint
    from epmq_cli.evaluate.score import room_of
    from epmq_cli.inference.load import kernels
    from epmq_cli.report import metrics, table
    from epmq_cli.report.stages import Stages
    from epmq_cli.resume.key import identity, of_scoring
    from epmq_cli.resume.state import close, opened, refuse_results
    from epmq_cli.shared import Shared

    refuse_results(folder)
    config.check_complete(cfg, "run")
    ranks.join(config.device_of(cfg.device))
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    job, checkpoint = steps.make_job(cfg), folder / "checkpoint"
    title = f"{job.suite.name}: {choices['merge']}, {choices['guidance']}, {choices['quant']}"
    say(f"{len(job.suite.members)} experts, on {job.device}, results go to {table.near(folder)}")
    stages, scores, cache = Stages(job.device), metrics.Scores(), open_cache(cfg.cache)
    room, scoring = guide.room_of(job), room_of(job.evaluation.batch_size)
    with stages.stage("read"):
        models, model, dtype = steps.open_models(job, folder)
        shared = Shared(cache, job, models, dtype)
        tasks, drawn = steps.prepare_tasks(job, model, models), steps.calibration_batches(job, models.base.path)
        state = opened(folder, identity(resolved, models, drawn, job.device), job.resume)
        refuse_results(folder, state)
    scored = state.part(of_scoring(job.evaluation, tasks, [task.data for task in job.suite.members]))
    with stages.stage("score base and experts"):
        scores |= scored.value("parts", lambda: steps.score_parts(job, model, models, tasks, shared.recall, scoring))
    with stages.stage("teach"):
        taught = guide.teach(job, model, models.source, drawn, state, shared.taught, room)
    with stages.stage("merge"):
        merged = shared.merged()
        install(model, merged)
    with stages.stage("score merged"):
        known = (models.base.path, shared.recall("merged"), scoring)
        scores |= scored.value("merged", lambda: steps.score(job, model, tasks, "merged", *known))
    with stages.stage("calibrate and quantize"):
        calibrated = guide.calibrate(job, model, taught.batches, tasks, merged, folder, state, room)
        tasks = guide.solve_heads(job, model, taught, tasks, calibrated.guidance, room)
    state.begin_packing()
    if not ranks.first():
        return
    with stages.stage("pack"):
        contents = Contents(
            model=model,
            weights=calibrated.walked.weights,
            dequantize=job.family.dequantize_on_load,
            heads={task.name: task.head for task in tasks},
            base=models.base.path,
            texts=steps.texts(job, model, resolved, choices, calibrated.walked),
            dtype=dtype,
        )
        if not checkpoint.exists():
            write_checkpoint(checkpoint, contents, config.bytes_of("pack.shard_size", job.pack.shard_size))
    measured = {"seed": job.seed, **steps.measured(calibrated.walked), "guidance": guide.summary(job, calibrated)}
    measured |= {"bytes": steps.sizes(contents, checkpoint), "resumed": state.starts}
    del model, contents, calibrated, taught, drawn  # what is scored is read from the disk, and needs their room
    allocator.give_back()
    with stages.stage("score quantized"):
        if "quantized" in job.evaluation.stages:
            model = steps.open_checkpoint(job.family, checkpoint, job.device, job.evaluation.kernel)
            scores |= steps.score(job, model, tasks, "quantized", checkpoint, room=scoring)
            measured["kernels"] = kernels(model)
    measured["cache"] = shared.use
    measured["events"] |= {"batches_halved": room.halved, "eval_batches_halved": scoring.halved}
    measured |= {"scores": metrics.by_task(scores, job.suite.metrics), "stages": stages.records}
    metrics.write_json(folder / "metrics.json", metrics.metrics("run", overrides, resolved, job.device, measured))
    close(folder)
    table.show_run(measured, title, folder)
