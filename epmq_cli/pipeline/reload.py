"""Reads the record of a checkpoint that `epmq run` wrote: its suite, seed and classes; heads: task_heads.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from epmq_cli.checkpoint.expected_tensors import check_described
from epmq_cli.checkpoint.task_heads import read_heads
from epmq_cli.checkpoint.write import RECORD
from epmq_cli.config import instantiate, schema
from epmq_cli.data.suite import Suite, Task
from epmq_cli.errors import CheckpointError
from epmq_cli.evaluate.score import ScoredTask
from epmq_cli.families import suite_family
from epmq_cli.families.family import Family
from epmq_cli.families.tasks.adapter import Head
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.option_checks import check_scoring
from epmq_cli.pipeline.preflight import check_lengths
from epmq_cli.pipeline.scored_tasks import EvaluationData
from epmq_cli.pipeline.task_processors import saved_processors
from epmq_cli.runtime.paths import read_regular
from epmq_cli.runtime.products import exact_products


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint. Raises CheckpointError if they are missing."""
    try:
        record: dict[str, Any] = json.loads(read_regular(checkpoint / RECORD))
        complete = all(isinstance(record["config"][part], dict) for part in ("suite", "quant"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint} has no readable {RECORD}; give the checkpoint folder that epmq run wrote"
        ) from error
    if not complete:
        raise CheckpointError(f"{checkpoint / RECORD} was not written by epmq run; run epmq run again")
    return record


def recorded_tasks(checkpoint: Path) -> tuple[str, list[str]]:
    """The family and the task names in a checkpoint's record. Nothing is instantiated."""
    suite = read_record(checkpoint)["config"]["suite"]
    tasks = suite.get("tasks") or suite.get("experts")
    if not isinstance(tasks, dict) or not isinstance(suite.get("family"), str):
        raise CheckpointError(f"{checkpoint / RECORD} was not written by epmq run; run epmq run again")
    return suite["family"], list(tasks)


def check_own(path: Path, node: Any, remedy: str) -> None:
    """Raises CheckpointError if a checkpoint's config names a class outside of epmq, or contains an interpolation, for
    example of an environment variable. `remedy`: tells users who trust the config what to do."""
    foreign = [target for target in instantiate.targets(node) if not _is_own(target)]
    if foreign:
        raise CheckpointError(f"{path} names {foreign[0]}, which is not a class of epmq; if you trust it, {remedy}")
    if "${" in json.dumps(node):
        raise CheckpointError(f"{path} contains an interpolation such as ${{...}}, which epmq does not write; {remedy}")


def _is_own(target: str) -> bool:
    """Whether a class is defined in epmq, not only imported there."""
    import hydra

    try:
        return target.startswith("epmq_cli.") and hydra.utils.get_class(target).__module__.startswith("epmq_cli.")
    except (ImportError, ValueError):
        return False


def checkpoint_suite(checkpoint: Path, override: DictConfig | None, root: str | None) -> Suite:
    """The `override` suite, or else the recorded one. Raises CheckpointError if the checkpoint records no suite.
    `root`: a mirror of the hub that replaces the recorded one."""
    record = read_record(checkpoint)["config"]["suite"]
    if override is None:
        check_own(checkpoint / RECORD, record, "give the suite with suite=NAME")
    node = override if override is not None else OmegaConf.create(record if root is None else _with_root(record, root))
    suite: Suite = instantiate.build("suite", node)
    return suite


def _with_root(node: Any, root: str) -> Any:
    """The config with every `root` replaced."""
    if isinstance(node, dict):
        return {key: root if key == "root" else _with_root(child, root) for key, child in node.items()}
    return [_with_root(child, root) for child in node] if isinstance(node, list) else node


def ready(
    checkpoint: Path, suite: Suite, evaluation: schema.Evaluation, device: torch.device
) -> tuple[Family, nn.Module, list[ScoredTask]]:
    """The family, the model and the tasks of a checkpoint, ready to be scored. With `eval.server`, an empty module
    stands for the model."""
    exact_products(device)
    ModelFolder(checkpoint, "checkpoint")  # rejects links and paths that leave the folder, which transformers follows
    check_described(checkpoint)
    family = suite_family(suite, checkpoint)
    scored = not isinstance(evaluation, schema.Harness)
    check_scoring(suite, family, evaluation, scored)
    check_lengths(suite, family, checkpoint)
    heads, record = read_heads(checkpoint, suite, family, device), read_record(checkpoint)
    data = EvaluationData(family, checkpoint, evaluation.samples if scored else 0, recorded_seed(record))
    processors = saved_processors(checkpoint, record, list(heads))
    tasks = []
    for task in suite.members:
        head = heads[task.name]
        names = recorded_classes(record, task, family, head)
        tasks.append(data.scored_task(task, head, names, processors.get(task.name)))
    served = isinstance(evaluation, schema.Harness) and evaluation.server is not None
    model = nn.Module() if served else steps.open_checkpoint(family, checkpoint, device, evaluation)
    return family, model, tasks


def recorded_seed(record: Mapping[str, Any]) -> int:
    """The seed of the run, which determines its test samples."""
    seed = record["config"].get("seed", 0)
    return seed if isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 else 0


def recorded_classes(record: Mapping[str, Any], task: Task, family: Family, head: Head) -> tuple[str, ...] | None:
    """The class names of a task's head; None if the record lacks them, as records of epmq 0.1 do. The classes of tasks
    without a head are in the suite."""
    classes = record.get("classes")
    names = classes.get(task.name) if isinstance(classes, dict) else None
    if family.heads != "none" and isinstance(names, list) and len(names) == len(head["weight"]):
        return tuple(map(str, names))
    return None if family.heads == "own" else task.classes
