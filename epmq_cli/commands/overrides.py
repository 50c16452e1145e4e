"""Checks of the command line before Hydra reads it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString, Sweep
from yaml import MarkedYAMLError

from epmq_cli.commands.readable import parsed
from epmq_cli.config.instantiate import conf_dir, groups_of, options_of
from epmq_cli.errors import ConfigError, first_line, literal
from epmq_cli.merge.parameters import Parameters

SHARED = "|".join(field.name for field in dataclasses.fields(Parameters))
OPTIONAL = re.compile(rf"(suite\.((each\.|tasks\.[^=]+\.)?(processor|heads)|tokenizer)|merge\.({SHARED}))=")

SWEPT = re.compile(r"(\w+)=[^\[{(\"'].*,")
"""A group with several options."""


def check_overrides(command: str, texts: Sequence[str]) -> None:
    """ConfigError if an override is unreadable (readable.py), deletes an option, gives a group a value that is not a
    name, or `out` a value that is not a folder."""
    options, groups = options_of(command), groups_of(command)
    for override in parsed(texts):
        name = override.key_or_group
        if override.is_delete():
            if name in options:
                raise ConfigError(f"{name} cannot be deleted from the config, got {override.input_line}")
        elif name in groups:
            _check_group(name, override)
        elif name == "out" and (override.value() in ("", None) or isinstance(override.value(), (list, dict))):
            raise ConfigError(f"out must be a folder, got {literal(override.value())}")


def addable(arguments: Sequence[str]) -> list[str]:
    """The arguments, with Hydra's `++` before options that the file of a suite or a merge may omit, and before options
    of a group that a sweep goes over, because Hydra first composes the config of a sweep without it."""
    swept = {match[1] for argument in arguments if (match := SWEPT.match(argument))}

    def added(argument: str) -> bool:
        group, dot, _ = argument.partition("=")[0].partition(".")
        return bool(OPTIONAL.match(argument)) or (dot == "." and group in swept)

    return [f"++{argument}" if added(argument) else argument for argument in arguments]


def unreadable(error: Exception, flags: Sequence[str]) -> str:
    """The unreadable config file and the reason; `flags`: with the user's --config-dir."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {error.problem}"
    folders = [Path(folder) for flag, folder in pairwise(flags) if flag in ("--config-dir", "-cd")]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.yaml")) if path.is_file()]
    binary = [path for path in paths if not _is_text(path)] if isinstance(error, UnicodeDecodeError) else []
    reason = first_line(error)
    return f"{binary[0]} is not UTF-8 text" if binary else reason


def _is_text(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _check_group(group: str, override: Override) -> None:
    value: Any = override.value()
    if isinstance(value, (Glob, Sweep)) and not isinstance(value, ChoiceSweep):
        return  # patterns
    for name in value.list if isinstance(value, ChoiceSweep) else [value]:
        if not isinstance(name, (str, QuotedString)) or name == "":
            options = ", ".join(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))
            raise ConfigError(f"{group} must be one of {options} (see epmq list {group}), got {literal(name)}")
