"""The settings of a config, and the linears around the values of attention."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from epmq_cli.families.structure import Linears, Norm
from epmq_cli.models.answers import cached_answer
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import from_folder

if TYPE_CHECKING:
    from epmq_cli.models.rotation import ValueHeads


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


def value_heads(
    layers: str, steps: Sequence[Linears | Norm], names: Mapping[str, str], heads: int
) -> ValueHeads | None:
    """The linears that make values and those that read them, of blocks with these steps; None if they are parts of
    larger linears. `layers`: the module of the blocks; `names`: name in the model -> stored name."""
    from epmq_cli.models.rotation import ValueHeads  # a module: imports torch

    linears = [step for step in steps if isinstance(step, Linears)]
    mixing = {name for step in linears for name in step.mixing}
    for step in linears:
        if step.producer is not None and step.producer in mixing:
            block = re.escape(layers) + r"\.\d+\."
            value = re.compile(block + re.escape(step.producer) + r"\.(?:weight|bias)")
            output = re.compile(block + re.escape(step.names[0]) + r"\.weight")
            values, outputs = ({names[name] for name in names if each.fullmatch(name)} for each in (value, output))
            return ValueHeads(values, outputs, heads)
    return None
