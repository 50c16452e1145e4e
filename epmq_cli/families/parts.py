"""Readouts that several architectures share, and the settings of a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from epmq_cli.families.structure import Norm, Section
from epmq_cli.models.answers import cached_answer
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import from_folder


class FirstToken(nn.Module):
    """The readout of heads that read the first token of the last block's output."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(samples, width) from (samples, tokens, width)."""
        return hidden[:, 0]


class LastNorm(nn.Module):
    """The readout that norms one token, or all, under the norm's own name."""

    def __init__(self, model: nn.Module, name: str, token: int | None) -> None:
        super().__init__()
        self._name, self._token = name, token
        self.add_module(name, model.get_submodule(name))

    def forward(self, hidden: Tensor) -> Tensor:
        """(samples, width) of the token, or (samples, tokens, width) of all."""
        read = hidden if self._token is None else hidden[:, self._token]
        normed: Tensor = self.get_submodule(self._name)(read)
        return normed

    @classmethod
    def section(cls, model: nn.Module, path: str, token: int | None = None) -> Section:
        """The readout with the norm at this path."""
        prefix, _, name = path.rpartition(".")
        return Section(prefix, cls(model.get_submodule(prefix), name, token), (Norm(name),))


def block_settings(
    folder: ModelFolder,
    part: str | None = None,
    names: Sequence[str] = ("num_attention_heads", "hidden_act", "layer_norm_eps"),
) -> dict[str, Any]:
    """The settings of these names in a folder's config, or its sub-config `part` if it has one, defaults filled in."""

    def ask() -> dict[str, Any]:
        from transformers import AutoConfig

        config = from_folder(AutoConfig, folder.path)
        config = getattr(config, part, config) if part else config
        return {name: getattr(config, name, None) for name in names}

    question = {"settings of": folder.config, "part": part, "names": list(names)}
    settings: dict[str, Any] = cached_answer(question, ask, __file__)
    return settings
