"""The config in a metrics.json, compared with the defaults in conf/."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.errors import literal

TARGET = "_target_"
PLACES = ("out", "experiment")
"""Options that do not change results."""
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
LONGEST = 200  # characters of a value
UNKNOWN = object()


@dataclass(frozen=True)
class Setting:
    """An option with its value and default as text, and whether they differ. `default`: None if conf/ has none."""

    key: str
    value: str
    default: str | None
    changed: bool


def choices(config: Mapping[str, Any]) -> dict[str, str]:
    """The option of each group, such as `ties` of merge. A suite goes by its own name, your own class by the class."""
    return {
        group: _option(group, node)[0] for group, node in config.items() if isinstance(node, Mapping) and TARGET in node
    }


def settings(config: Mapping[str, Any], command: str = "run") -> list[Setting]:
    """All options of a config in its order, each compared with the default of the option that was chosen."""
    usual, own = _usual(command), _yaml(conf_dir() / f"{command}.yaml")
    rows = []
    for key, value in config.items():
        if key in PLACES:
            continue
        if isinstance(value, Mapping) and TARGET in value:
            name, default = choices(config)[key], usual.get(key)
            rows.append(Setting(key, name, default, name != default))
            rows += _group(key, key, value, config)
        else:
            rows.append(_setting(key, value, own.get(key, UNKNOWN), config))
    return rows


def value_at(config: Mapping[str, Any], key: str) -> str:
    """The value of an option as text, of a group the chosen option; empty if the config lacks it."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return ""
        node = node[part]
    if isinstance(node, Mapping) and TARGET in node:
        return _option(key.split(".")[0], node)[0]
    return text(node)


def text(value: Any) -> str:
    """A value as the user types it; texts without quotes, long ones cut."""
    whole = value if isinstance(value, str) else literal(value)
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]}…"


def _group(group: str, path: str, node: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Setting]:
    """The options of a group's node. A suite has no defaults."""
    defaults = _option(group, node)[1]
    for key, value in node.items():
        if key == TARGET:
            continue
        if isinstance(value, Mapping) and TARGET in value:
            yield from _group(group, f"{path}.{key}", value, config)
        elif group == "suite":
            yield Setting(f"{path}.{key}", text(value), None, False)
        else:
            yield _setting(f"{path}.{key}", value, defaults.get(key, UNKNOWN), config)


def _setting(key: str, value: Any, default: Any, config: Mapping[str, Any]) -> Setting:
    if isinstance(default, str) and "${" in default:
        whole = REFERENCE.fullmatch(default)
        default = config.get(whole[1], value) if whole else value
    if default is UNKNOWN:
        return Setting(key, text(value), None, True)
    return Setting(key, text(value), text(default), value != default)


def _option(group: str, node: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name and the content of the YAML of the group with the node's class that differs least from the node."""
    name = str(node[TARGET]).rpartition(".")[2]
    if group == "suite":
        return str(node.get("name", name)), {}
    same = [(path.stem, content) for path, content in _options(group) if content.get(TARGET) == node[TARGET]]
    return min(same, key=lambda option: _differences(node, option[1]), default=(name, {}))


def _differences(node: Mapping[str, Any], content: Mapping[str, Any]) -> int:
    keys = {*node, *content} - {"defaults"}
    values = [(node.get(key, UNKNOWN), content.get(key, UNKNOWN)) for key in keys]
    return sum(given != default and not (isinstance(default, str) and "${" in default) for given, default in values)


@cache
def _options(group: str) -> tuple[tuple[Path, dict[str, Any]], ...]:
    return tuple((path, _yaml(path)) for path in sorted((conf_dir() / group).glob("*.yaml")))


@cache
def _usual(command: str) -> dict[str, str]:
    """The default option of each group."""
    entries = [entry for entry in _yaml(conf_dir() / f"{command}.yaml").get("defaults", []) if isinstance(entry, dict)]
    return {group: str(name) for entry in entries for group, name in entry.items()}


def _yaml(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return content if isinstance(content, dict) else {}
