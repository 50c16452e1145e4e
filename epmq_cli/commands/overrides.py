"""What of the command line is checked before Hydra sees it, which would stumble over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, Sweep

from epmq_cli.config import conf_dir, groups_of, options_of
from epmq_cli.errors import ConfigError, shown


def check_overrides(command: str, texts: Sequence[str]) -> None:
    """ConfigError where an override takes an option out of the config, gives a group something else than one of its
    names, or `out` something that is no folder."""
    known, groups = options_of(command), groups_of(command)
    for override in OverridesParser.create().parse_overrides(list(texts)):
        name = override.key_or_group
        if override.is_delete():
            if name in known:
                raise ConfigError(f"{name} cannot be taken out of the config, got {override.input_line}")
        elif name in groups:
            _check_group(name, override)
        elif name == "out" and (override.value() in ("", None) or isinstance(override.value(), (list, dict))):
            raise ConfigError(f"out must be a folder, got {shown(override.value())}")


def _check_group(group: str, override: Override) -> None:
    value: Any = override.value()
    if isinstance(value, Sweep) and not isinstance(value, ChoiceSweep):
        return  # of patterns
    for name in value.list if isinstance(value, ChoiceSweep) else [value]:
        if not isinstance(name, (str, QuotedString)) or name == "":
            options = ", ".join(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))
            raise ConfigError(f"{group} must be one of {options} (see epmq list {group}), got {shown(name)}")
