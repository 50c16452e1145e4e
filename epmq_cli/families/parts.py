"""The settings of a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epmq_cli.models.answers import cached_answer
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import from_folder


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
