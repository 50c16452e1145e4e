"""Reads and checks the heads of a checkpoint's tasks: `<task>.<part>` in heads/heads.safetensors, in float32."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from epmq_cli.checkpoint.write import heads_file
from epmq_cli.data.suite import Suite
from epmq_cli.errors import CheckpointError
from epmq_cli.families.family import Family
from epmq_cli.models.model_folder import SafetensorsFiles, TensorInfo
from epmq_cli.models.pretrained import config_of
from epmq_cli.quantize.linalg import is_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STORED = "F32"
DENSE, NORM = "dense_", "norm_"
"""Prefixes of the parts of the dense layer in front of a head's linear, and of the norm between the two."""


def read_heads(checkpoint: Path, suite: Suite, family: Family, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """The tensors of each task's head; CheckpointError if they do not fit the suite's tasks and the model."""
    if family.heads == "none":
        return {task.name: {} for task in suite.members}
    path = heads_file(checkpoint)
    try:
        if not path.is_file():
            raise FileNotFoundError("it is not a file")
        from safetensors.torch import load_file  # imports torch

        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); run epmq run again") from error
    heads: dict[str, dict[str, Tensor]] = {task.name: {} for task in suite.members}
    stored = {name.rpartition(".")[0] for name in tensors}
    missing = [task for task in heads if task not in stored]
    if missing:
        raise CheckpointError(f"{path} has no head for task {missing[0]}; its tasks are {', '.join(sorted(stored))}")
    own = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in heads}
    infos = SafetensorsFiles(path, "checkpoint").infos
    problems = head_problems({name: infos[name] for name in own}, heads, family, config_of(checkpoint))
    problem = next(problems, None) or next(
        (f"{name} holds NaN or infinity" for name, tensor in own.items() if not is_finite(tensor)), None
    )
    if problem:
        raise CheckpointError(
            f"{path} does not hold the heads of this model: {problem}; fetch it again, or run epmq run again"
        )
    for name, tensor in own.items():
        task, _, part = name.rpartition(".")
        heads[task][part] = tensor
    return heads


def head_problems(
    infos: Mapping[str, TensorInfo], tasks: Collection[str], family: Family, config: Any
) -> Iterator[str]:
    """A phrase for each tensor of the heads that does not fit the tasks, or a model with this config."""
    width = family.head_widths * int(_setting(config, family.head_width))
    for task in tasks:
        yield from (f"{task}.{part} is missing" for part in family.head_parts if _needed(infos, f"{task}.{part}"))
    for name, info in infos.items():
        task, _, part = name.rpartition(".")
        if task not in tasks or part not in family.head_parts:
            yield f"{name} is not a part of a head"
        elif info.dtype != STORED:
            yield f"{name} is of type {info.dtype}, epmq writes {STORED}"
        elif not info.shape or info.shape != (expected := _shape(infos, task, part, width, info)):
            implied = list(expected) if info.shape else "another shape"
            yield f"{name} is {list(info.shape)}, config.json implies {implied}"


def _setting(config: Any, path: str) -> Any:
    """The setting at this path of configs; 0 if there is none."""
    return reduce(lambda part, name: getattr(part, name, 0), path.split("."), config)


def _needed(infos: Mapping[str, TensorInfo], name: str) -> bool:
    """Whether a required part is missing; biases are optional."""
    return name not in infos and name.endswith("weight")


def _shape(infos: Mapping[str, TensorInfo], task: str, part: str, width: int, info: TensorInfo) -> tuple[int, ...]:
    """The shape that a part must have. A linear has any number of rows; its inputs are the outputs of the layer in
    front of it, or the features. Its bias has its rows. A norm behind the dense layer has that layer's rows."""
    prefix = DENSE if part.startswith((DENSE, NORM)) else ""
    if part.endswith("bias") or part.startswith(NORM):
        return (_rows(infos, f"{task}.{prefix}weight"),)
    before = f"{task}.{DENSE}weight"
    return (max(info.shape[0], 1), width if prefix or before not in infos else _rows(infos, before))


def _rows(infos: Mapping[str, TensorInfo], name: str) -> int:
    return infos[name].shape[0] if name in infos and infos[name].shape else 0
