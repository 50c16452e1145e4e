"""Splits the command line into overrides and Hydra's options. Imports neither torch nor Hydra."""

from __future__ import annotations

import os

from epmq_cli.errors import ConfigError
from epmq_cli.runtime.verbosity import KINDS, PROGRESS

FULL_ERROR = "HYDRA_FULL_ERROR"
"""The variable that makes Hydra and epmq print tracebacks."""
FROM_MERGEKIT = "--from-mergekit"
"""The option of `epmq merge` and `epmq run` that prints the command for a mergekit file."""
WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")


def take_progress(arguments: list[str]) -> list[str]:
    """The arguments without `progress=KIND` and `--quiet`, which set the variable. ConfigError names a wrong kind."""
    rest = []
    for argument in arguments:
        name, _, kind = argument.partition("=")
        if argument == "--quiet":
            kind = "quiet"
        elif name != "progress":
            rest.append(argument)
            continue
        if kind not in KINDS:
            raise ConfigError(f"progress must be one of {', '.join(KINDS)}, got {kind}")
        os.environ[PROGRESS] = kind
    return rest


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Overrides, and Hydra's options with their values: Hydra itself accepts no overrides after an option."""
    overrides, flags = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            flags.append(argument)
            if argument in WITH_VALUE:
                flags += [value for value in [next(rest, None)] if value is not None]
        else:
            overrides.append(argument)
    return overrides, flags
