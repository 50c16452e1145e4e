"""Replaces `merge=mergekit merge.file=FILE` on the command line by the options of epmq, and prints them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epmq_cli.commands.arguments import FROM_MERGEKIT
from epmq_cli.errors import ConfigError

CHOICE, FILE = "merge=mergekit", "merge.file="
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
WORDS = ("null", "true", "false", "inf", "nan", "yes", "no", "on", "off")


def replaced(command: str, overrides: Sequence[str]) -> list[str]:
    """The overrides with the options of a mergekit file in place of its name. Options that the user gives count."""
    if CHOICE not in overrides:
        return list(overrides)
    files = [text.removeprefix(FILE).strip("'\"") for text in overrides if text.startswith(FILE)]
    if len(files) != 1:
        raise ConfigError(f"{CHOICE} needs one {FILE}config.yml, got {len(files) or 'none'}")
    rest = [text for text in overrides if text != CHOICE and not text.startswith(FILE)]
    return [*_options(command, files[0], rest), *rest]


def show(command: str, arguments: Sequence[str]) -> None:
    """Prints the command that does what a mergekit file says; `arguments`: with --from-mergekit and the file."""
    texts = [
        part for text in arguments for part in (text.split("=", 1) if text.startswith(f"{FROM_MERGEKIT}=") else [text])
    ]
    place = texts.index(FROM_MERGEKIT)
    if place + 1 == len(texts):
        raise ConfigError(f"{FROM_MERGEKIT} needs the path of a mergekit file")
    rest = [*texts[:place], *texts[place + 2 :]]
    print(shlex.join(["epmq", command, *_options(command, texts[place + 1], rest), *rest]))


def _options(command: str, file: str, given: Sequence[str]) -> list[str]:
    """The overrides of a file, without those that the user gives."""
    if command not in ("run", "merge"):
        raise ConfigError(f"epmq {command} reads no mergekit file; epmq merge and epmq run do")
    from epmq_cli.merge.mergekit import mergekit_options

    keys = {text.lstrip("+~").partition("=")[0] for text in given}
    options = mergekit_options(Path(file), command)
    return [f"{key}={typed(value)}" for key, value in options.items() if key not in keys]


def typed(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(typed, value)) + "]"
    if not isinstance(value, str):
        return repr(value)
    if value.startswith("${") or (PLAIN.fullmatch(value) and value.lower() not in WORDS):
        return value
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
    tail = len(escaped) - len(escaped.rstrip("\\"))
    return '"' + (escaped + "\\" * tail).replace("${", r"\${") + '"'
