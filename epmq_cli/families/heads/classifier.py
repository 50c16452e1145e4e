"""Classification by a task's own linear head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from epmq_cli.data.labels import WITHOUT
from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.quantize.linalg import is_finite

SHOWN = 8  # names of a long list


def read_head(expert: ModelFolder, name: str, width: int) -> dict[str, Tensor]:
    """`weight` (classes, width) and, where the linear has one, `bias` (classes,), in float32; ModelError where they are
    not there, of other shapes or not finite."""
    head = {
        part: expert.tensor(f"{name}.{part}").float() for part in ("weight", "bias") if f"{name}.{part}" in expert.infos
    }
    if "weight" not in head:
        raise ModelError(f"{expert.role}: {expert.path} has no {name}.weight, the head of its task")
    shapes = {"weight": (len(head["weight"]), width), "bias": (len(head["weight"]),)}
    for part, tensor in head.items():
        if tensor.shape != shapes[part]:
            raise ModelError(
                f"{expert.role}: {name}.{part} must have the shape {list(shapes[part])} to read what the base gives, "
                f"got {list(tensor.shape)}"
            )
        if not is_finite(tensor):
            raise ModelError(f"{expert.role}: {name}.{part} holds a NaN or an infinity; train or fetch the model again")
    return head


def read_names(expert: ModelFolder, rows: int) -> tuple[str, ...] | None:
    """The names of an expert's classes in the order of its head of so many rows, as `id2label` of its config.json has
    them; None where they are those that transformers gives (LABEL_0, ...).

    Where that names none, `label2id` counts. ModelError where they are of another head, or contradict each other.
    """
    where = f"{expert.role}: {expert.path / 'config.json'}"
    given, inverse = expert.config.get("id2label"), expert.config.get("label2id")
    forth = names_by_position(given if isinstance(given, dict) else {})
    back = names_by_position({key: name for name, key in inverse.items()} if isinstance(inverse, dict) else {})
    if forth and back and forth != back and sorted(forth.values()) == sorted(back.values()):
        raise ModelError(
            f"{where} has an id2label that contradicts its label2id: {_listed(forth)} and {_listed(back)}; correct one "
            "of them"
        )
    names = forth or back
    if names and sorted(names) != list(range(rows)):
        raise ModelError(
            f"{where} names the classes {_listed(names)}, and its head has {rows} rows, 0 to {rows - 1}; correct "
            "id2label"
        )
    return tuple(names[index] for index in range(rows)) if names else None


def names_by_position(names: Mapping[Any, Any]) -> dict[int, str]:
    """Names by the position that their keys are; nothing where these are no positions, or where all names are
    transformers' own in their order."""
    try:
        found = {int(key): str(name) for key, name in names.items()}
    except (TypeError, ValueError):
        return {}
    default = all(re.fullmatch(rf"label_?{position}", name, re.IGNORECASE) for position, name in found.items())
    return {} if default else found


def _listed(names: Mapping[int, str]) -> str:
    found = [f"{position}: {names[position]}" for position in sorted(names)]
    return ", ".join(found[:SHOWN] + (["..."] if len(found) > SHOWN else []))


def check_single_label(expert: ModelFolder, task: str) -> None:
    """ModelError where an expert gives several labels to a sample, which no metric here scores."""
    kind = expert.config.get("problem_type")
    if kind == "multi_label_classification":
        raise ModelError(
            f"{expert.role}: {expert.path / 'config.json'} has problem_type {kind}; epmq scores task {task} by one "
            f"label a sample and does not take multi-label heads; {WITHOUT}"
        )


def logits(features: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """(samples, classes) from features (samples, width)."""
    product = features @ head["weight"].T
    return product + head["bias"] if "bias" in head else product
