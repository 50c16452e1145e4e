"""`epmq eval CHECKPOINT`: scores a checkpoint, which transformers loads from disk, on the tasks of its suite."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from epmq_cli.commands.error_report import log_errors
from epmq_cli.commands.hydra_app import quiet_libraries, tell_loading
from epmq_cli.config import instantiate
from epmq_cli.store.run_lock import refuse_used


@hydra.main(version_base="1.3", config_path=str(instantiate.conf_dir()), config_name="eval")
@log_errors
def main(cfg: DictConfig) -> None:
    """Scores one checkpoint, or one in each job of a sweep."""
    evaluate(cfg, Path(HydraConfig.get().runtime.output_dir), list(HydraConfig.get().overrides.task))


def evaluate(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Prints the scores and writes them to `metrics.json` in the folder."""
    tell_loading()
    quiet_libraries()
    from epmq_cli.checkpoint.load import kernels
    from epmq_cli.evaluate.score import Scorer
    from epmq_cli.pipeline import reload
    from epmq_cli.report import metrics_json, table
    from epmq_cli.report.stage_timer import Stages

    refuse_used(folder, "metrics.json")
    instantiate.check_complete(cfg, "eval")
    checkpoint, device = Path(cfg.checkpoint), instantiate.device_of(cfg.device)
    suite = reload.checkpoint_suite(checkpoint, cfg.suite, cfg.data_root)
    evaluation, stages = instantiate.build("eval", cfg.eval), Stages(device)
    with stages.stage("read"):
        family, model, tasks = reload.ready(checkpoint, suite, evaluation, device)
    with stages.stage("score quantized"):
        scorer = Scorer(evaluation, family, device)
        scores = scorer.scores(model, tasks, "quantized", checkpoint)
    measured = {
        "scores": metrics_json.by_task(scores, suite.metrics),
        "kernels": kernels(model),
        "stages": stages.records,
        "events": {"eval_batches_halved": scorer.micro.halved},
    }
    resolved = OmegaConf.to_container(cfg, resolve=True)
    metrics_json.write_json(
        folder / "metrics.json", metrics_json.metrics("eval", overrides, resolved, device, measured)
    )
    table.show_eval(measured, f"{suite.name}: {checkpoint}", folder)
