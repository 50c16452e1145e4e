"""Runs on the miniature hub within the test's process: single steps, or the whole command."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from epmq_cli.calibrate.progress import WalkResult
from epmq_cli.commands.run import run
from epmq_cli.config.instantiate import conf_dir
from epmq_cli.data.batching import Batches
from epmq_cli.families.family import load_model
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job

QUICK = ("guidance=expert", "group_size=16", "device=cpu", "calib.samples=24", "calib.batch_size=8", "cache=false")
GROUPS = {path.name for path in conf_dir().iterdir() if path.is_dir()}
CHOICES = {"suite": "mini", "merge": "task_arithmetic", "guidance": "expert", "quant": "gptq"}


def config(hub: Path, *overrides: str) -> DictConfig:
    """The config of a small, fast `epmq run suite=mini`."""
    return _composed("run", (hub / "configs", conf_dir()), "suite=mini", *QUICK, *overrides)


def merge_config(hub: Path, *overrides: str) -> DictConfig:
    """The config of `epmq merge suite=mini`."""
    return _composed("merge", (hub / "configs", conf_dir()), "suite=mini", *overrides)


def eval_config(checkpoint: Path, *overrides: str) -> DictConfig:
    """The config of `epmq eval`."""
    return _composed("eval", (conf_dir(),), f"checkpoint='{checkpoint}'", "device=cpu", *overrides)


def _composed(command: str, folders: tuple[Path, ...], *overrides: str) -> DictConfig:
    """The config as Hydra composes it, but faster: an option of a group replaces a node."""
    given = OverridesParser.create().parse_overrides(list(overrides))
    cfg, options = _defaults(command).copy(), {override.key_or_group: override for override in given}
    OmegaConf.set_struct(cfg, False)
    for group in GROUPS & options.keys():
        cfg[group] = option_node(folders, group, options[group].value())
    OmegaConf.set_struct(cfg, True)
    values = [override for override in given if override.key_or_group not in GROUPS]
    ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    return cfg


def option_node(folders: tuple[Path, ...], group: str, name: str) -> DictConfig:
    """The node of an option. Its defaults, if any, are options of the same group, or of a folder in it, that become
    parts of it."""
    path = Path(group, f"{name}.yaml")
    node = OmegaConf.load(next(folder / path for folder in folders if (folder / path).exists()))
    for entry in node.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            option, part = entry.split("@")
            node[part] = option_node(folders, group, option)
        elif entry != "_self_":
            [(source, option)] = entry.items()
            folder, part = source.split("@")
            OmegaConf.update(node, part, option_node(folders, f"{group}/{folder}", option))
    return node


@cache
def _defaults(command: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(command, overrides=["out=unused", *(["checkpoint=unused"] if command == "eval" else [])])


def run_in(folder: Path, hub: Path, *overrides: str) -> Path:
    """Runs the body of the command; returns the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    run(config(hub, *overrides), folder, list(overrides), CHOICES)
    return folder / "checkpoint"


@dataclass(frozen=True)
class Walk:
    """The results of all steps up to the walk: the student after it, the records, and one batch of each task."""

    job: steps.Job
    student: nn.Module
    walked: WalkResult
    batches: Batches

    def features(self, model: nn.Module) -> Tensor:
        """The features of all calibration batches, concatenated, in the model's type."""
        dtype = next(model.parameters()).dtype
        batches = [
            {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
            for group in self.batches.values()
            for batch in group
        ]
        with torch.inference_mode():
            return torch.cat([self.job.family.features(model, batch) for batch in batches])


def walk(hub: Path, *overrides: str) -> Walk:
    """Runs the steps up to the walk."""
    job = make_job(config(hub, *overrides))
    models, model, dtype = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    tasks = steps.prepare_tasks(job, model, models)
    context = RunContext.of(job)
    taught = guide.run_teachers(context, model, models.source, batches)
    merged = LazyMerge(models.source, job.merge, dtype)
    copy_into(model, merged)
    calibrated = guide.calibrate(context, model, taught.batches, tasks, merged)
    return Walk(job, model, calibrated.walk, taught.batches)


LONE = ("~suite.tasks.second", "guidance=feature", "guidance.lam=0.0000001", "quant=none", "merge=none")


def lone_expert(hub: Path, *options: str) -> tuple[Tensor, Tensor, Tensor]:
    """The features of base, student and expert (rows, width) with one task, no anchor and no quantizer: the student
    starts from another model and ends as the expert."""
    found = walk(hub, *LONE, *options)
    models, model, _ = steps.open_models(found.job)
    far = found.features(model)
    copy_into(model, {name: models.source.expert("first", name) for name in models.source.names})
    return far, found.features(found.student), found.features(model)


class Scene:
    """A job with the base model and the batches of a task, completed by its expert."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.job = make_job(config(folder, *overrides))
        self.family = self.job.family
        self.models, self.model, _ = steps.open_models(self.job)
        drawn = steps.calibration_batches(self.job, self.models.base.path)
        self.batches = guide.run_teachers(RunContext.of(self.job), self.model, self.models.source, drawn).batches[
            "first"
        ]
        self.model = load_model(self.family, self.models.base.path, torch.device("cpu"))
        if self.models.rewritten:
            copy_into(self.model, {name: self.models.source.base(name) for name in self.models.source.names})
