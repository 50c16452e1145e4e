"""Parameters that may differ between tensors and between experts, in the forms that mergekit has.

A setting is one of these:

- a number
- a list of numbers, which are interpolated over the layers of each stack, from the first to the last
- a list of rules {filter: TEXT, value: SETTING}; the first rule whose filter is part of the tensor's name counts, and
  the last rule has no filter, so that it counts for all other names. A rule with `layers: false` counts only for
  tensors outside the layers, such as embeddings, one with `layers: true` only for those inside
- a mapping from tasks to any of these, for parameters of experts
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Setting = Any
"""One of the forms above; None for the method's default."""

LAYER = re.compile(r"^(.*?)\.(\d+)\.")
FRONT = re.compile(
    r"embed|patch|position|shared|conv1|class_token|pre_?layr?norm|ln_pre|wte|wpe|project_in|encoder\.layernorm\."
    r"|relative_attention_bias"
)
"""Names of tensors in front of the first layer, in lower case."""
BEHIND = re.compile(r"embed_out|model\.embedding_norm")
"""Names of tensors behind the last layer, as in GPT-NeoX and LFM2, although FRONT fits them."""


@dataclass(frozen=True)
class TensorSetting:
    """The values of a setting: `at` looks one up. `depths`: the place of each tensor, see `layer_depths`."""

    setting: Setting
    default: float
    depths: Mapping[str, float]

    def at(self, name: str, task: str = "") -> float:
        """The value for a tensor, and for a task's expert if the setting has one for each."""
        setting = self.setting.get(task) if isinstance(self.setting, Mapping) else self.setting
        return self.default if setting is None else _value(setting, name, self.depths.get(name, 0.0))


def _value(setting: Setting, name: str, depth: float) -> float:
    """The value for a tensor at a depth in [0, 1]."""
    if isinstance(setting, (int, float)):
        return setting
    if not isinstance(setting[0], Mapping):
        place = depth * (len(setting) - 1)
        low = int(place)
        high = min(low + 1, len(setting) - 1)
        return float((1 - (place - low)) * setting[low] + (place - low) * setting[high])
    rule = next(rule for rule in setting if _counts(rule, name))
    return _value(rule["value"], name, depth)


def _counts(rule: Mapping[str, Any], name: str) -> bool:
    fits = rule.get("filter") in (None, "*") or rule["filter"] in name
    return fits and rule.get("layers") in (None, LAYER.match(name) is not None)


def is_for_all(rule: Mapping[str, Any]) -> bool:
    """Whether a rule counts for all names."""
    return rule.get("filter") in (None, "*") and rule.get("layers") is None


def layer_depths(names: Iterable[str]) -> dict[str, float]:
    """The depth of each tensor in [0, 1]: 0 in the first layer of its stack, 1 in the last one. A layer's number is the
    first number in a tensor's name. Tensors in front of the layers have depth 0, those behind them 1."""
    layers = {name: (match[1], int(match[2])) for name in names if (match := LAYER.match(name))}
    last: dict[str, int] = {}
    for stack, number in layers.values():
        last[stack] = max(last.get(stack, 0), number)
    depths = {}
    for name in names:
        if name not in layers:
            depths[name] = 0.0 if FRONT.search(name.lower()) and not BEHIND.search(name) else 1.0
        else:
            stack, number = layers[name]
            depths[name] = number / last[stack] if last[stack] else 0.0
    return depths


def weighted(vectors: Mapping[str, Tensor], weights: TensorSetting, name: str) -> list[Tensor]:
    """The experts' tensors of a name, by task, each times its weight; the tensors themselves without weights."""
    if weights.setting is None:
        return list(vectors.values())
    return [weights.at(name, task) * vector for task, vector in vectors.items()]
