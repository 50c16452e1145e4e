"""What a checkpoint that `epmq run` wrote knows of itself beside the model: its suite and the heads of its tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from epmq_cli import config
from epmq_cli.checkpoint.pack import HEADS, RECORD
from epmq_cli.errors import CheckpointError
from epmq_cli.families.family import Family
from epmq_cli.suites import Suite


def checkpoint_suite(checkpoint: Path, given: DictConfig | None, root: str | None) -> Suite:
    """The suite that a checkpoint was made from, with its data in the mirror `root` where that is given, or the suite
    that is given; CheckpointError where there is no record of it."""
    try:
        recorded = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))["config"]["suite"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} has no readable {RECORD}; give the checkpoint folder that epmq run wrote"
        ) from error
    foreign = [target for target in config.targets(recorded) if not str(target).startswith("epmq_cli.")]
    if foreign and given is None:
        raise CheckpointError(
            f"{checkpoint / RECORD} names {foreign[0]}, which is not epmq's; "
            "if you trust it, give the suite by suite=NAME"
        )
    found = given if given is not None else OmegaConf.create(recorded if root is None else _moved(recorded, root))
    suite: Suite = config.build("suite", found)
    return suite


def _moved(node: Any, root: str) -> Any:
    """A config with every `root` in it another one."""
    if isinstance(node, dict):
        return {key: root if key == "root" else _moved(child, root) for key, child in node.items()}
    return [_moved(child, root) for child in node] if isinstance(node, list) else node


def read_heads(checkpoint: Path, suite: Suite, family: Family, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """The tensors of each task's head."""
    if family.heads == "none":
        return {task.name: {} for task in suite.members}
    try:
        tensors = load_file(checkpoint / HEADS, device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint / HEADS} cannot be read ({error}); run epmq run again") from error
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        task, part = name.rsplit(".", 1)
        heads.setdefault(task, {})[part] = tensor
    missing = [task.name for task in suite.members if task.name not in heads]
    if missing:
        raise CheckpointError(
            f"{checkpoint / HEADS} has no head for task {missing[0]}; its tasks are {', '.join(heads)}"
        )
    return heads
