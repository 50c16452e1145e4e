"""Encoders of transformers, each described by a row: the names of its modules, and the readout of its last block.

Base: any checkpoint of the encoder. Experts: its `...ForSequenceClassification` or the like; the modules behind the
encoder there are the task's head. The linears of the blocks are quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.data.batching import Batch
from epmq_cli.errors import ModelError
from epmq_cli.families.architecture import Architecture
from epmq_cli.families.parts import block_settings, value_heads
from epmq_cli.families.structure import (
    MEAN,
    FirstAndMean,
    Linears,
    Norm,
    ReadToken,
    Section,
    Stack,
    Table,
    pooled,
    token_mask,
)
from epmq_cli.models.folded_factors import Folded
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import config_of, from_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_cli.models.rotation import ValueHeads

GAMMA_AND_BETA = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
"""The names of layer norms in old checkpoints, and today's."""
COMPUTED = ("position_ids", "relative_position_index")
"""The ends of the names of tensors that transformers computes; older files have them."""
POOLING: Mapping[str, ReadToken] = {"cls": 0, "mean": MEAN}


@dataclass(frozen=True, kw_only=True)
class Encoder(Architecture):
    """One stack of blocks between embeddings and a readout."""

    prefix: str
    """The prefix of the encoder's tensors in models that have more than the encoder."""

    parts: tuple[str, ...]
    """The prefixes of the encoder's own tensors."""

    layers: str
    """The module that holds the blocks."""

    steps: tuple[Linears | Norm, ...]
    """The steps of each block."""

    stem: tuple[Table, ...] = ()
    first_norm: str | None = None
    """See Stack."""

    last_norm: str | None = None
    """The norm behind the blocks."""

    pooler: str | None = None
    """A module with a linear `dense` that reads the first token, if heads read its output."""

    pooling: str | None = None
    """The setting of the config that says whether heads read the first token (`cls`) or the mean of all (`mean`)."""

    reads: ReadToken = 0
    """The token that heads read, if no setting says it. Means are of the tokens behind the registers, if there are
    any."""

    factors: tuple[tuple[str, str], ...] = ()
    """Patterns of factors of the output channels of linears, and the names of these linears. Factors are folded into
    the linears where models are read, and are 1 afterwards."""

    shared: tuple[str, ...] = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    """The settings that base and experts must share."""

    fixed: Mapping[str, object] = field(default_factory=dict)
    """Settings, each with the only value that the steps support."""

    old_names: tuple[tuple[str, str], ...] = GAMMA_AND_BETA
    """Patterns of tensor names in older files, and today's names."""

    reserved: int = 0
    """The number of positions that no token can have."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options for from_pretrained."""

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """All tensors except task heads."""
        self.check_type(folder)
        return {
            name: stored
            for name, stored in self.all_names(folder).items()
            if name.startswith(self.parts) and not name.endswith(COMPUTED)
        }

    def spelling(self, stored: str) -> str:
        """The model's own name of a stored tensor."""
        stored = stored.removeprefix(self.prefix)
        for old, new in self.old_names:
            stored = re.sub(old, new, stored)
        return stored

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """The settings named in `shared`; ModelError if one named in `fixed` has another value."""
        for name, usual in self.fixed.items():
            value = folder.config.get(name, usual)
            if value != usual:
                raise ModelError(
                    f"{folder.role}: {folder.path} has {name} {value}, family {self.name} takes {usual} only"
                )
        return block_settings(folder, names=self.shared)

    def value_heads(self, folder: ModelFolder) -> ValueHeads | None:
        """The values of all blocks."""
        settings = self.settings(folder)
        heads = settings.get("num_attention_heads") or settings.get("n_heads") or 1
        return value_heads(self.layers, self.steps, self.all_names(folder), heads)

    def folded(self, folder: ModelFolder) -> ModelFolder:
        """The model with its `factors` folded into linears."""
        names, factors = self.all_names(folder), dict[str, str]()
        for name, (pattern, linear) in product(names, self.factors):
            if match := re.fullmatch(pattern, name):
                linears = [f"{match.expand(linear)}.{part}" for part in ("weight", "bias")]
                factors |= {names[own]: names[name] for own in linears if own in names}
        return (
            ModelFolder(folder.path, folder.role, folder.config, Folded(folder.source, factors)) if factors else folder
        )

    def is_folded(self, name: str) -> bool:
        """Whether a tensor is one of `factors`."""
        return any(re.fullmatch(pattern, name) for pattern, _ in self.factors)

    @property
    def reads_pooler(self) -> bool:
        """Whether heads read what the model's own pooler returns."""
        return self.pooler is not None

    def positions(self, folder: Path) -> int | None:
        """The rows of the position table that tokens can use; None for image encoders."""
        rows: int | None = getattr(config_of(folder), "max_position_embeddings", None)
        return None if rows is None else rows - self.reserved

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """The encoder alone."""
        from transformers import AutoModel

        model: nn.Module = from_folder(AutoModel, folder, **self.options, **options)
        return model

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The blocks and their readout."""
        layers, token = model.get_submodule(self.layers), self.read_token(model)
        blocks = [Section(f"{self.layers}.{index}", layer, self.steps) for index, layer in layers.named_children()]
        return [Stack(blocks, self._readout(model, token), self.stem, self.first_norm, token, token_mask)]

    def read_token(self, model: nn.Module) -> ReadToken:
        """The token of the last block's output that heads read."""
        config: Any = model.config
        if isinstance(self.reads, FirstAndMean):
            return FirstAndMean(self.reads.start + getattr(config, "num_register_tokens", 0))
        return self.reads if self.pooling is None else POOLING[getattr(config, self.pooling)]

    def _readout(self, model: nn.Module, token: ReadToken) -> Section:
        if self.pooler is not None:
            return Section(self.pooler, model.get_submodule(self.pooler), (Linears(("dense",)),))
        from epmq_cli.families.readouts import AllTokens, FirstToken, LastNorm  # modules: import torch

        if self.last_norm is not None:
            return LastNorm.section(model, self.last_norm, token if isinstance(token, int) else None)
        return Section("", FirstToken() if isinstance(token, int) else AllTokens(), ())

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The output of the pooler, or else of `read_token`: (samples, width)."""
        output = model(**batch)
        if self.reads_pooler:
            features: Tensor = output.pooler_output
            return features
        return pooled(output.last_hidden_state, self.read_token(model), token_mask(batch))
