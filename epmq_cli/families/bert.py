"""BERT classifiers (https://arxiv.org/abs/1810.04805) as transformers has them: encoder, embeddings and pooler are
merged.

Base: any BERT checkpoint with a pooler. Experts: `BertForSequenceClassification`, whose classifier is the task's
head. The linears of the blocks are quantized; the pooler stays dense.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.evaluate import classifier
from epmq_cli.families.family import Batch, Collate, Head, Linears, Norm, Patches, Section, Table, block_settings
from epmq_cli.suites import Task

PARTS = ("embeddings.", "encoder.", "pooler.")
PREFIX = "bert."
STEPS = (
    Linears(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        mixing=("attention.self.key", "attention.self.value"),
    ),
    Linears(("attention.output.dense",), stream="attention.self.query"),
    Norm("attention.output.LayerNorm"),
    Linears(("intermediate.dense",)),
    Linears(("output.dense",), stream="intermediate.dense"),
    Norm("output.LayerNorm"),
)


class Bert:
    """`family: bert`."""

    stem: tuple[Patches | Table, ...] = tuple(
        Table(f"embeddings.{kind}_embeddings") for kind in ("word", "position", "token_type")
    )
    first_norm: str | None = "embeddings.LayerNorm"
    read_token: int | None = 0
    own_heads = True
    dequantize_on_load = False

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """Everything but task heads. Layer norms of old checkpoints are called gamma and beta: both spellings are
        read."""
        model_type = folder.config.get("model_type")
        if model_type != "bert":
            raise ModelError(f"{folder.role}: {folder.path} holds a model of type {model_type}, family bert takes bert")
        names = {}
        for stored in folder.infos:
            name = stored.removeprefix(PREFIX)
            name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
            if name.startswith(PARTS) and not name.endswith("position_ids"):
                names[name] = stored
        if "pooler.dense.weight" not in names:
            raise ModelError(f"{folder.role}: {folder.path} has no pooler, which the classifiers of family bert read")
        return names

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """Those of the encoder."""
        return block_settings(folder)

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """A BertModel with its pooler."""
        from transformers import BertModel

        model: nn.Module = BertModel.from_pretrained(folder, **options)
        return model

    def blocks(self, model: nn.Module) -> list[Section]:
        """The layers of the encoder."""
        layers = model.get_submodule("encoder.layer")
        return [Section(f"encoder.layer.{index}", layer, STEPS) for index, layer in layers.named_children()]

    def readout(self, model: nn.Module) -> Section:
        """The pooler, which reads the first token."""
        return Section("pooler", model.get_submodule("pooler"), (Linears(("dense",)),))

    def collate(self, folder: Path, task: Task) -> Collate:
        """Texts, or pairs of texts, padded to the longest of the batch and cut at the task's `max_length` tokens."""
        from transformers import AutoConfig, AutoTokenizer

        positions = AutoConfig.from_pretrained(folder, local_files_only=True).max_position_embeddings
        if task.max_length > positions:
            raise ConfigError(
                f"suite.tasks.{task.name}.max_length must be at most {positions}, the positions that the base has, "
                f"got {task.max_length}"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

        def collate(texts: list[Any]) -> Batch:
            return dict(
                tokenizer(texts, padding=True, truncation=True, max_length=task.max_length, return_tensors="pt")
            )

        return collate

    def token_mask(self, batch: Batch) -> Tensor | None:
        """True where there is no padding."""
        return batch["attention_mask"].bool()

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The pooler's output: (samples, hidden size)."""
        features: Tensor = model(**batch).pooler_output
        return features

    def head(self, model: nn.Module, base: Path, task: Task, expert: ModelFolder, device: torch.device) -> Head:
        """`weight` (classes, hidden size) and `bias` (classes,) of the expert's classifier."""
        return {name: tensor.to(device) for name, tensor in classifier.read_head(expert, "classifier").items()}

    def head_inputs(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features

    def logits(self, features: Tensor, head: Head) -> Tensor:
        """Those of a linear."""
        return classifier.logits(features, head)
