"""What families of encoders with a classifier on their first token have in common.

Base: any checkpoint of the encoder. Experts: its `...ForSequenceClassification` or the like; what lies behind the
encoder there is the task's head, one linear, or a dense layer with an activation and a linear. The linears of the
blocks are quantized.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.suite import POSITION, Task
from epmq_cli.families.family import Family, Head
from epmq_cli.families.heads import classifier
from epmq_cli.families.parts import block_settings
from epmq_cli.families.processors import tokens
from epmq_cli.families.structure import Linears, Norm, Section
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import config_of, from_folder
from epmq_cli.models.processor_folder import Processor


class FirstToken(nn.Module):
    """What a head reads of the last block's output (samples, tokens, width): the first token, (samples, width)."""

    def forward(self, hidden: Tensor) -> Tensor:
        """The first token."""
        return hidden[:, 0]


class Classifier(Family):
    """An encoder whose tasks have classifiers of their own."""

    heads = "own"
    read_token: int | None = 0
    metrics = ("accuracy", "matthews", "spearman")

    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """For the encoder's from_pretrained."""

    prefix: str
    """Of the encoder's tensors in models that have more than the encoder."""

    parts: tuple[str, ...]
    """How the names of the encoder's tensors begin, without that prefix."""

    layers: str
    """The module that holds the blocks."""

    steps: tuple[Linears | Norm, ...]
    """Of each block."""

    dense: str | None = None
    """The dense layer of heads that have one."""

    linear = "classifier"
    """The linear of heads."""

    activation: Callable[[Tensor], Tensor] = staticmethod(torch.tanh)
    """Between the two."""

    def __init__(self) -> None:
        linear = ("weight", "bias")
        self.head_parts = linear if self.dense is None else (*linear, "dense_weight", "dense_bias")

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """Everything but task heads. Layer norms of old checkpoints are called gamma and beta: both spellings are
        read."""
        self.check_type(folder)
        return {
            name: stored
            for name, stored in self.all_names(folder).items()
            if name.startswith(self.parts) and not name.endswith("position_ids")
        }

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """Those of the encoder."""
        return block_settings(folder)

    def in_head(self, name: str) -> bool:
        """Whether a tensor belongs to the linear of a head or the dense layer in front of it."""
        return name.startswith(tuple(f"{part}." for part in (self.dense, self.linear) if part))

    def spelling(self, stored: str) -> str:
        """The model's own name of a stored tensor."""
        stored = stored.removeprefix(self.prefix)
        return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", stored))

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """The encoder alone."""
        from transformers import AutoModel

        model: nn.Module = from_folder(AutoModel, folder, **self.options, **options)
        return model

    def blocks(self, model: nn.Module) -> list[Section]:
        """The layers of the encoder."""
        layers = model.get_submodule(self.layers)
        return [Section(f"{self.layers}.{index}", layer, self.steps) for index, layer in layers.named_children()]

    def readout(self, model: nn.Module) -> Section:
        """The first token."""
        return Section("", FirstToken(), ())

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The first token of the encoder's output: (samples, hidden size)."""
        features: Tensor = model(**batch).last_hidden_state[:, 0]
        return features

    def head(self, model: nn.Module, base: Path, task: Task, expert: ModelFolder, device: torch.device) -> Head:
        """`weight` (classes, hidden size) and `bias` (classes,) of the expert's classifier; `dense_weight` and
        `dense_bias` of the layer in front of it."""
        width = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        if self.dense is not None:
            dense = classifier.read_head(expert, self.dense, width)
            head = classifier.read_head(expert, self.linear, len(dense["weight"]))
            head |= {f"dense_{part}": tensor for part, tensor in dense.items()}
        else:
            head = classifier.read_head(expert, self.linear, width)
        return {name: tensor.to(device) for name, tensor in head.items()}

    def class_names(self, task: Task, expert: ModelFolder, base: ModelFolder, head: Head) -> tuple[str, ...] | None:
        """Those of the expert's config; an adapter has no config of its own, only the base's."""
        if expert.config is base.config or task.match_labels == POSITION:
            return None
        return classifier.read_names(expert, len(head["weight"]))

    def head_inputs(self, features: Tensor, head: Head) -> Tensor:
        """What the dense layer makes of the features, where there is one."""
        if self.dense is None:
            return features
        hidden = {name.removeprefix("dense_"): tensor for name, tensor in head.items() if name.startswith("dense_")}
        return self.activation(classifier.logits(features, hidden))

    def logits(self, features: Tensor, head: Head) -> Tensor:
        """Those of the linear."""
        return classifier.logits(self.head_inputs(features, head), head)


class TextClassifier(Classifier):
    """Those that read texts, or pairs of texts."""

    sample_types = (str, tuple)
    reserved = 0
    """Positions that no token can have."""

    def positions(self, folder: Path) -> int | None:
        """Those of the table of positions."""
        found: int = config_of(folder).max_position_embeddings
        return found - self.reserved

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Texts, or pairs of texts, padded to the longest of the batch and cut at the task's `max_length` tokens."""
        tokenizer = tokens(folder, processor=processor)

        def collate(texts: list[Any]) -> Batch:
            return dict(tokenizer(texts, padding=True, truncation=True, max_length=task.max_length))

        return collate

    def token_mask(self, batch: Batch) -> Tensor | None:
        """True where there is no padding."""
        return batch["attention_mask"].bool()
