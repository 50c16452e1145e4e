"""Checks of option values: ranges, choices and keys."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

from epmq_cli.errors import ConfigError, literal


def check_range(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    integer: bool = False,
) -> None:
    """ConfigError unless `value` is a number (`integer`: an int) in [low, high] (`open_low`: in (low, high])."""
    kind = "a whole number" if integer else "a number"
    span = f"{'(' if open_low else '['}{low}, {high}{')' if high == float('inf') else ']'}"
    is_number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    inside = is_number and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type, operator]
    if not inside or (open_low and value == low):
        raise ConfigError(f"{name} must be {kind} in {span}, got {literal(value)}")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """ConfigError unless `value` is one of `allowed`."""
    options = list(allowed)
    if value not in options or isinstance(value, bool) != isinstance(options[0], bool):
        names = ", ".join(option if isinstance(option, str) else literal(option) for option in options)
        raise ConfigError(f"{name} must be one of {names}, got {literal(value)}")


def check_keys(where: str, keys: Iterable[str], options: Iterable[str], required: Iterable[str] = ()) -> None:
    """ConfigError if a key is unknown (the message names the closest option) or a required one is missing."""
    options, keys = list(options), list(keys)
    for key in keys:
        if key not in options:
            near = difflib.get_close_matches(str(key), options, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{where} has no option {key!r}, the options are {', '.join(options)}{hint}")
    missing = [key for key in required if key not in keys]
    if missing:
        present = f"only {', '.join(keys)}" if keys else "nothing"
        raise ConfigError(f"{where} needs {', '.join(missing)}, but {present} is set")
