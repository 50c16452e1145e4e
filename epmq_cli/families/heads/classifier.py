"""Task heads that are trained with their experts: reads their tensors and computes their logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.labels import WITHOUT
from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.quantize.linalg import is_finite

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = 8  # names of a long list

Activation = Callable[["Tensor"], "Tensor"]


def tanh(hidden: Tensor) -> Tensor:
    """tanh of each element."""
    return torch.tanh(hidden)


@dataclass(frozen=True)
class ClassifierHead:
    """The modules of a head by their names in the expert: a linear, or dense, activation, [norm,] linear.

    `activation`: a function, or the setting of the config that names one of transformers'. `norm`: a layer norm, `eps`:
    the setting of the config with its epsilon.
    """

    linear: str = "classifier"
    dense: str | None = None
    activation: Activation | str = tanh
    norm: str | None = None
    eps: str = "norm_eps"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the tensors that `read` returns; biases are optional."""
        dense = () if self.dense is None else ("dense_weight", "dense_bias")
        norm = () if self.norm is None else ("norm_weight", "norm_bias")
        return ("weight", "bias", *dense, *norm)

    def contains(self, name: str) -> bool:
        """Whether the expert's tensor of this name belongs to the head."""
        return name.startswith(tuple(f"{part}." for part in (self.dense, self.norm, self.linear) if part))

    def read(self, expert: ModelFolder, width: int) -> dict[str, Tensor]:
        """The head's tensors in float32, for features of this width; ModelError as for `read_head`."""
        dense, norm = {}, {}
        if self.dense is not None:
            dense = read_head(expert, self.dense, width)
            width = len(dense["weight"])
        if self.norm is not None:
            norm = read_norm(expert, self.norm, width)
        head = read_head(expert, self.linear, width)
        head |= {f"dense_{part}": tensor for part, tensor in dense.items()}
        return head | {f"norm_{part}": tensor for part, tensor in norm.items()}

    def inputs(self, model: nn.Module, features: Tensor, head: Mapping[str, Tensor]) -> Tensor:
        """The inputs (samples, inner width) of the linear, from features (samples, width)."""
        if self.dense is None:
            return features
        hidden = self._activation(model)(logits(features, _part(head, "dense_")))
        if self.norm is None:
            return hidden
        norm, config = _part(head, "norm_"), model.config
        return torch.nn.functional.layer_norm(
            hidden, norm["weight"].shape, norm["weight"], norm.get("bias"), getattr(config, self.eps)
        )

    def _activation(self, model: nn.Module) -> Activation:
        if not isinstance(self.activation, str):
            return self.activation
        from transformers.activations import ACT2FN

        activation: Activation = ACT2FN[getattr(model.config, self.activation)]
        return activation


def _part(head: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in head.items() if name.startswith(prefix)}


def read_head(expert: ModelFolder, name: str, width: int) -> dict[str, Tensor]:
    """`weight` (classes, width) and, if the linear has one, `bias` (classes,), in float32; ModelError if one is
    missing, has another shape or is not finite."""
    head = _tensors(expert, name)
    rows = len(head["weight"])
    _check(expert, name, head, {"weight": (rows, width), "bias": (rows,)}, "the base gives")
    return head


def read_norm(expert: ModelFolder, name: str, width: int) -> dict[str, Tensor]:
    """`weight` (width,) and, if the norm has one, `bias` (width,), in float32; ModelError as for `read_head`."""
    norm = _tensors(expert, name)
    _check(expert, name, norm, {"weight": (width,), "bias": (width,)}, "the dense layer gives")
    return norm


def _tensors(expert: ModelFolder, name: str) -> dict[str, Tensor]:
    stored = {part: f"{name}.{part}" for part in ("weight", "bias")}
    tensors = {part: expert.tensor(own).float() for part, own in stored.items() if own in expert.infos}
    if "weight" not in tensors:
        raise ModelError(f"{expert.role}: {expert.path} has no {name}.weight, the head of its task")
    return tensors


def _check(
    expert: ModelFolder,
    name: str,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    inputs: str,
) -> None:
    for part, tensor in tensors.items():
        if tensor.shape != shapes[part]:
            raise ModelError(
                f"{expert.role}: {name}.{part} must have the shape {list(shapes[part])} to read what {inputs}, "
                f"got {list(tensor.shape)}"
            )
        if not is_finite(tensor):
            raise ModelError(f"{expert.role}: {name}.{part} holds a NaN or an infinity; train or fetch the model again")


def read_names(expert: ModelFolder, rows: int) -> tuple[str, ...] | None:
    """The names of an expert's classes in the order of its head, which has this number of rows, from `id2label` in its
    config.json; None if they are transformers' defaults (LABEL_0, ...).

    Without names in `id2label`, reads `label2id`. ModelError if they contradict each other or do not fit the rows.
    """
    where = f"{expert.role}: {expert.path / 'config.json'}"
    id2label, label2id = expert.config.get("id2label"), expert.config.get("label2id")
    forth = names_by_position(id2label if isinstance(id2label, dict) else {})
    back = names_by_position({key: name for name, key in label2id.items()} if isinstance(label2id, dict) else {})
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
    """Names by position, from a mapping with positions as keys; empty if the keys are not positions, or if all names
    are transformers' defaults in their order."""
    try:
        by_position = {int(key): str(name) for key, name in names.items()}
    except (TypeError, ValueError):
        return {}
    default = all(re.fullmatch(rf"label_?{position}", name, re.IGNORECASE) for position, name in by_position.items())
    return {} if default else by_position


def _listed(names: Mapping[int, str]) -> str:
    items = [f"{position}: {names[position]}" for position in sorted(names)]
    return ", ".join(items[:SHOWN] + (["..."] if len(items) > SHOWN else []))


def check_single_label(expert: ModelFolder, task: str) -> None:
    """Raises ModelError if an expert predicts several labels per sample, which no metric here scores."""
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
