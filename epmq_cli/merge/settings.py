"""Parameters that may differ between tensors and between experts, in the forms that mergekit has.

A setting is one of these:

- a number
- a list of numbers, which are interpolated over the layers of each stack, from the first to the last
- a list of rules {filter: TEXT, value: SETTING}; the first rule whose filter is part of the tensor's name counts, and a
  rule without a filter counts for all names
- a mapping from tasks to any of these, for parameters of experts
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epmq_cli.config.validate import check_keys, check_range
from epmq_cli.errors import ConfigError, shown

Setting = Any
"""One of the forms above; None for the method's default."""

LAYER = re.compile(r"^(.*?)\.(\d+)\.")
FRONT = re.compile(r"embed|patch|position|shared|conv1|class_token|pre_?layr?norm|ln_pre|wte|wpe")
"""Names of tensors in front of the first layer."""


@dataclass(frozen=True)
class TensorSetting:
    """The values of a setting: `at` looks one up. `depths`: the place of each tensor, see `layer_depths`."""

    setting: Setting
    default: float
    depths: Mapping[str, float]

    def at(self, name: str, task: str = "") -> float:
        """The value for a tensor, and for a task's expert if the setting has one for each."""
        setting = self.setting.get(task) if isinstance(self.setting, Mapping) else self.setting
        value = _value(setting, name, self.depths.get(name, 0.0))
        return self.default if value is None else value


def _value(setting: Setting, name: str, depth: float) -> float | None:
    """The value for a tensor at a depth in [0, 1]; None if no rule counts for it."""
    if setting is None or isinstance(setting, (int, float)):
        return setting
    if not isinstance(setting[0], Mapping):
        place = depth * (len(setting) - 1)
        low = int(place)
        high = min(low + 1, len(setting) - 1)
        return float((1 - (place - low)) * setting[low] + (place - low) * setting[high])
    for rule in setting:
        if rule.get("filter") in (None, "*") or rule["filter"] in name:
            return _value(rule["value"], name, depth)
    return None


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
            depths[name] = 0.0 if FRONT.search(name.lower()) else 1.0
        else:
            stack, number = layers[name]
            depths[name] = number / last[stack] if last[stack] else 0.0
    return depths


def check_setting(
    where: str, setting: Setting, low: float, high: float, *, by_task: bool = False, open_low: bool = False
) -> None:
    """ConfigError unless a setting has one of the forms above and its numbers lie in [low, high] (`open_low`: in
    (low, high]). `by_task`: whether it may be a mapping from tasks."""
    if isinstance(setting, Mapping) and by_task:
        for task, value in setting.items():
            check_setting(f"{where}.{task}", value, low, high, open_low=open_low)
    elif isinstance(setting, (list, tuple)) and setting:
        rules = isinstance(setting[0], Mapping)
        for index, item in enumerate(setting):
            place = f"{where}[{index}]"
            if rules:
                _check_rule(place, item)
                check_setting(f"{place}.value", item["value"], low, high, open_low=open_low)
            else:
                check_range(place, item, low, high, open_low=open_low)
    elif isinstance(setting, (list, tuple, Mapping, str)) or setting is None:
        tasks = ", a mapping from tasks" if by_task else ""
        raise ConfigError(
            f"{where} must be a number, a list of numbers over the layers, a list of rules {{filter, value}}{tasks}; "
            f"got {shown(setting)}"
        )
    else:
        check_range(where, setting, low, high, open_low=open_low)


def _check_rule(where: str, rule: object) -> None:
    if not isinstance(rule, Mapping):
        raise ConfigError(
            f"{where} must be a rule {{filter, value}} like the first item of its list, got {shown(rule)}"
        )
    check_keys(where, rule, ("filter", "value"), ("value",))
    if not isinstance(rule.get("filter", ""), (str, type(None))):
        raise ConfigError(f"{where}.filter must be a part of tensor names, got {shown(rule['filter'])}")


def check_tasks(where: str, setting: Setting, tasks: Sequence[str]) -> None:
    """ConfigError if a setting names a task that the suite lacks."""
    if isinstance(setting, Mapping):
        check_keys(where, setting, tasks)
