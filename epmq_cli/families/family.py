"""What the walker, the packer and the scorer need to know of a model architecture, and nothing else in epmq knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Linears:
    """Linears that read the same input.

    `stream`: the module whose input is the residual stream that their outputs are added to, if they are. `mixing`:
    those whose outputs reach the other tokens, as keys and values do.
    """

    names: tuple[str, ...]
    stream: str | None = None
    mixing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Norm:
    """A norm with a gain. `mixing`: whether its output reaches the other tokens."""

    name: str
    mixing: bool = False


@dataclass(frozen=True)
class Patches:
    """A convolution whose kernel is its stride and that has no bias, the table of positions that is added to what it
    gives, and the class token that comes first, if there is one."""

    convolution: str
    positions: str
    class_token: str | None


@dataclass(frozen=True)
class Table:
    """A table of embeddings that is looked up."""

    name: str


@dataclass(frozen=True)
class Section:
    """A part of the model that is walked through in one go: its steps in the order of the forward pass.

    Names in `steps` are the module's own; with `prefix` before them they are the model's.
    """

    prefix: str
    module: nn.Module
    steps: tuple[Linears | Norm, ...]

    @property
    def linears(self) -> list[str]:
        """The module's own names of its linears, in the order of the steps."""
        return [name for step in self.steps if isinstance(step, Linears) for name in step.names]

    def name(self, local: str) -> str:
        """The name in the model of a module or tensor of this section."""
        return f"{self.prefix}.{local}" if self.prefix else local


class Family(Protocol):
    """One architecture. Names of tensors and modules are those of the model that `load` returns."""

    stem: tuple[Patches | Table, ...]
    """What the first stream is the sum of."""

    first_norm: str | None
    """The norm that the embeddings go through before the first block, if there is one."""

    read_token: int | None
    """The one token that is read out behind the last block; None where all are."""

    own_heads: bool
    """Whether each task has a head of its own, trained with its expert, rather than one made by the base."""

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

    def blocks(self, model: nn.Module) -> list[Section]:
        """The blocks in order. Their linears are what is quantized."""

    def readout(self, model: nn.Module) -> Section:
        """What makes the features of the last block's output (samples, tokens, width), as a module of its own that
        shares its tensors with the model."""

    def collate(self, folder: Path, task: Task) -> Collate:
        """Makes batches out of samples as the protocol of the task says, with the processor found in the folder."""

    def token_mask(self, batch: Batch) -> Tensor | None:
        """(samples, tokens) bool, True for the tokens that are real; None where all are."""

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the heads read: (samples, width)."""

    def head(self, model: nn.Module, base: Path, task: Task, expert: ModelFolder, device: torch.device) -> Head:
        """The tensors of a task's own head. `model` is the base."""

    def head_inputs(self, features: Tensor) -> Tensor:
        """What a head's weight is multiplied with: (samples, width)."""

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
    quantization = getattr(config, "quantization_config", None)
    mixed = quantization is not None and len(quantization["config_groups"]) > 1
    if quantization is not None and not mixed:
        quantization["dequantize"] = True
    model: Any = family.load(folder, config=config, dtype="auto", local_files_only=True)
    if mixed:  # transformers dequantizes all of them with the first width
        model.hf_quantizer.compressor.decompress_model(model)
    found: nn.Module = nn.Module.to(model, device, torch.float32)  # transformers' own refuses what came quantized
    return found.eval().requires_grad_(False)
