"""Every error that a user can cause, in one small tree.

    EpmqError
    ├── ConfigError       an option or a config file: what was typed is not allowed
    ├── ModelError        base or experts: files, tensor names, shapes, values
    ├── DataError         the data of a task
    ├── CheckpointError   a checkpoint that cannot be written, or was not written by epmq
    └── RunError          the run folder or its processes: in use, cannot be written, ended

The message is one sentence that names what was given, what is allowed and what to do. Anything else that is raised is
a defect of epmq and keeps its traceback.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class EpmqError(Exception):
    """A mistake in the input; the command prints it without a traceback and exits with status 1."""


class ConfigError(EpmqError):
    """An option or a config file holds something that is not allowed."""


class ModelError(EpmqError):
    """The base or an expert cannot be used as the suite says."""


class DataError(EpmqError):
    """The data of a task cannot be used as the suite says."""


class CheckpointError(EpmqError):
    """A checkpoint cannot be written or read."""


class RunError(EpmqError):
    """A run folder is in use or cannot be written, or a process of a run has ended."""


def check_range(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    integer: bool = False,
) -> None:
    """Refuses `value` unless it is a number (an int where `integer`) in [low, high]; (low, high] where `open_low`."""
    wanted = "a whole number" if integer else "a number"
    span = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if high == float('inf') else ']'}"
    is_number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    inside = is_number and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type, operator]
    if not inside or (open_low and value == low):
        raise ConfigError(f"{name} must be {wanted} in {span}, got {value!r}")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Refuses `value` unless it is one of `allowed`."""
    options = list(allowed)
    if value not in options or isinstance(value, bool) != isinstance(options[0], bool):
        raise ConfigError(f"{name} must be one of {', '.join(map(str, options))}, got {value!r}")


def check_keys(where: str, given: Iterable[str], known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Refuses keys that are not known, suggesting the nearest one, and the absence of required ones."""
    known, given = list(known), list(given)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{where} has no option {key!r}, the options are {', '.join(known)}{hint}")
    missing = [key for key in required if key not in given]
    if missing:
        raise ConfigError(f"{where} needs {', '.join(missing)}, but only {', '.join(given) or 'nothing'} is set")
