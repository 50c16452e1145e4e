"""`epmq run`: merge, calibrate, quantize, pack, score, report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from epmq_cli import config, ranks
from epmq_cli.commands.app import guarded, refuse_used


@hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="run")
@guarded
def main(cfg: DictConfig) -> None:
    """One job, or one of each job of a sweep, in the run folder that Hydra made."""
    hydra_config = HydraConfig.get()
    chosen = hydra_config.runtime.choices.items()
    choices = {group: str(name) for group, name in chosen if "/" not in group and name is not None}
    run(cfg, Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task), choices)


def run(cfg: DictConfig, folder: Path, overrides: list[str], choices: dict[str, str]) -> None:
    """Does the job of the config; afterwards the folder holds `checkpoint/` and `metrics.json`."""
    from epmq_cli import calibration as guide
    from epmq_cli import pipeline as steps
    from epmq_cli.calibrate.reference import install
    from epmq_cli.checkpoint.pack import Contents, write_checkpoint
    from epmq_cli.console import say
    from epmq_cli.families.family import load_model
    from epmq_cli.merge.apply import merge_models
    from epmq_cli.report import metrics, table
    from epmq_cli.report.stages import Stages

    refuse_used(folder, "checkpoint", "metrics.json")
    ranks.join(config.device_of(cfg.device))
    config.check_complete(cfg)
    resolved, job, checkpoint = OmegaConf.to_container(cfg, resolve=True), steps.make_job(cfg), folder / "checkpoint"
    title = f"{job.suite.name}: {choices['merge']}, {choices['guidance']}, {choices['quant']}"
    say(f"{len(job.suite.members)} experts, on {job.device}, results go to {table.near(folder)}")
    stages, scores = Stages(job.device), metrics.Scores()
    with stages.stage("read"):
        models, model, dtype = steps.open_models(job)
        tasks, drawn = steps.prepare_tasks(job, model, models), steps.calibration_batches(job, models.base.path)
    with stages.stage("score base and experts"):
        scores |= steps.score_parts(job, model, models, tasks)
    with stages.stage("teach"):
        taught = guide.teach(job, model, models.source, drawn)
    with stages.stage("merge"):
        install(model, merge_models(models.source, job.merge, dtype))
    with stages.stage("score merged"):
        scores |= steps.score(job, model, tasks, "merged", models.base.path)
    with stages.stage("calibrate and quantize"):
        calibrated = guide.calibrate(job, model, taught.batches, tasks, models.source, dtype, folder)
        walked = calibrated.walked
        tasks = guide.solve_heads(job, model, taught, tasks, calibrated.guidance)
    if not ranks.first():
        return
    with stages.stage("pack"):
        contents = Contents(
            model=model,
            weights=walked.weights,
            dequantize=job.family.dequantize_on_load,
            heads={task.name: task.head for task in tasks},
            base=models.base.path,
            texts=steps.texts(job, model, resolved, choices, walked),
            dtype=dtype,
        )
        write_checkpoint(checkpoint, contents, job.pack.shard_size)
    with stages.stage("score quantized"):
        scores |= steps.score(job, load_model(job.family, checkpoint, job.device), tasks, "quantized", checkpoint)
    measured = {
        "seed": job.seed,
        "scores": metrics.by_task(scores, job.suite.metrics),
        "layers": [asdict(record) for record in walked.records],
        "average_bits": steps.average_bits(walked),
        "guidance": guide.summary(job, calibrated),
        "events": steps.events(walked),
        "bytes": steps.sizes(contents, checkpoint),
        "stages": stages.records,
    }
    metrics.write_json(folder / "metrics.json", metrics.metrics("run", overrides, resolved, job.device, measured))
    table.show_run(measured, title, folder)
