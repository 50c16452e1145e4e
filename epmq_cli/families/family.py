"""What the walker, the packer and the scorer need to know of a model architecture, and nothing else in epmq knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.suites import Task

Batch = dict[str, Tensor]
"""Model inputs by keyword, the first axis being samples."""

Collate = Callable[[list[Any]], Batch]
Head = Mapping[str, Tensor]


class Family(Protocol):
    """One architecture. Names of tensors and modules are those of the model that `load` returns."""

    groups: tuple[tuple[str, ...], ...]
    """The linears of one block, in the order of the forward pass; those in one tuple read the same input."""

    dequantize_on_load: bool
    """Whether transformers must dequantize while it loads. Otherwise it does so when the whole model is first called,
    which is too late for models that are used through other methods, or whose modules read their linears' weights."""

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """The tensors of base or expert that are merged: name in the model -> name in the folder's files.

        ModelError where the folder holds another architecture.
        """

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """What base and experts must have in common and tensor shapes do not show, such as the number of heads."""

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """The whole model as transformers loads it; `options` go to its from_pretrained."""

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks in order, each with its name in the model."""

    def collate(self, folder: Path, task: Task) -> Collate:
        """Makes batches out of samples as the protocol of the task says, with the processor found in the folder."""

    def token_mask(self, batch: Batch) -> Tensor | None:
        """(samples, tokens) bool, True for the tokens that are real; None where all are."""

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the heads read: (samples, width)."""

    def head(self, model: nn.Module, base: Path, task: Task, expert: ModelFolder, device: torch.device) -> Head:
        """The tensors of a task's own head. `model` is the base."""

    def logits(self, features: Tensor, head: Head) -> Tensor:
        """(samples, classes)."""


def block_settings(folder: ModelFolder, part: str | None = None) -> dict[str, Any]:
    """The usual `settings` of a folder's config, defaults filled in; of its sub-config `part` where it has that."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
    config = getattr(config, part, config) if part else config
    return {name: getattr(config, name) for name in ("num_attention_heads", "hidden_act", "layer_norm_eps")}


def load_model(family: Family, folder: Path, device: torch.device) -> nn.Module:
    """The model of a base folder or of a checkpoint, ready to score.

    It has the very weights of the stored type, packed ones dequantized in that type, but calculates in float32.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        config.quantization_config["dequantize"] = True
    model = family.load(folder, config=config, dtype="auto", local_files_only=True)
    return model.float().to(device).eval().requires_grad_(False)
