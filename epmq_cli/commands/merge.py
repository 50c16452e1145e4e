"""`epmq merge`: merges the experts of a suite into one dense model, tensor by tensor, from disk to disk."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from epmq_cli.commands.error_report import log_errors
from epmq_cli.config import instantiate
from epmq_cli.runtime.imports import importing
from epmq_cli.store.run_lock import exclusive_lock, refuse_used

if TYPE_CHECKING:
    from epmq_cli.checkpoint.exporter import Exporter
    from epmq_cli.families.family import Family
    from epmq_cli.models.model_folder import ModelFolder

PROBE = 8  # the length in tokens of the synthetic texts on which tokenizers are compared


@hydra.main(version_base="1.3", config_path=str(instantiate.conf_dir()), config_name="merge")
@log_errors
def main(cfg: DictConfig) -> None:
    """Runs one merge, or one for each job of a sweep."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with exclusive_lock(folder):
        merge(cfg, folder, list(HydraConfig.get().overrides.task))


def merge(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Writes `metrics.json` and `checkpoint/`, a model folder like the base's."""
    with importing():
        import torch

        from epmq_cli.checkpoint.gguf.exporter import also_gguf
        from epmq_cli.checkpoint.open_clip import also_open_clip, check_base, check_family, stored_entries
        from epmq_cli.checkpoint.write_merged import write_dense
        from epmq_cli.families import suite_family
        from epmq_cli.merge.engine import LazyMerge
        from epmq_cli.merge.given import given_path
        from epmq_cli.merge.method import check_method, refuse_needs
        from epmq_cli.merge.slices import sliced
        from epmq_cli.merge.stacked import stacked
        from epmq_cli.merge.suite_models import SuiteModels
        from epmq_cli.models.processor_files import ProcessorFiles
        from epmq_cli.pipeline.task_processors import probes, save_processors, task_processors
        from epmq_cli.report import metrics_json, table
        from epmq_cli.report.stage_timer import Stages
        from epmq_cli.runtime.console import say

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # transformers only checks tokenizers here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    refuse_used(folder, "checkpoint", "metrics.json")
    instantiate.check_complete(cfg, "merge")
    suite, method = instantiate.build("suite", cfg.suite), instantiate.build("merge", cfg.merge)
    exporter: Exporter = instantiate.build("pack", cfg.pack)
    check_method(method, [task.name for task in suite.members])
    refuse_needs(method)
    device = instantiate.device_of(cfg.device)
    stages, checkpoint = Stages(device), folder / "checkpoint"
    say(f"{table.counted(len(suite.members), 'expert')}, results go to {table.near(folder)}")
    with stages.stage("read"):
        family = suite_family(suite)
        exporter.check(family, ())
        if exporter.open_clip:
            check_family(family, suite.family)
        models = SuiteModels(suite, family, whole=True, given=given_path(method))
        _check_engine(exporter, family, models.base)
        if exporter.open_clip:
            check_base(models.base)
        files = models.tokenizer or ProcessorFiles(models.base.path)  # fails early if transformers cannot load them
        tasks = [replace(task, max_length=PROBE) for task in suite.members]
        tasks = [] if models.tokenizer else tasks  # all read the result's tokenizer
        processors = task_processors(family, models, tasks, probes(family, models))
    with stages.stage("merge"):
        slices = sliced(method)
        written, merged = (
            stacked(models, slices, torch.float32, device)
            if slices
            else (models, LazyMerge(models.source, method, torch.float32, device=device))
        )
        processors_of_tasks = partial(save_processors, family, models.base.path, processors)
        others = also_open_clip(exporter.open_clip, processors_of_tasks, stored_entries)
        others = also_gguf(exporter.gguf, suite.name, others)
        size = write_dense(checkpoint, written, merged, exporter, files, others)
    measured = {"bytes": {"model_dense": size}, "stages": stages.records}
    content = metrics_json.metrics("merge", overrides, OmegaConf.to_container(cfg, resolve=True), device, measured)
    metrics_json.write_json(folder / "metrics.json", content)
    table.show_merge(measured, folder)


def _check_engine(exporter: Exporter, family: Family, base: ModelFolder) -> None:
    """ConfigError if the engine of `pack.engine` cannot load a dense model like the base."""
    from epmq_cli.checkpoint.engine import Base
    from epmq_cli.checkpoint.engines import check_engine, check_engine_model

    check_engine(exporter, family, ())
    check_engine_model(exporter, family, {}, (), Base(base.config, base.path))
