"""Checks of option values: ranges, choices and keys."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from epmq_cli.errors import ConfigError, literal

UNLIMITED = 1 << 20
"""Upper limits from here on only keep numbers computable."""
_notes: ContextVar[dict[str, str] | None] = ContextVar("notes", default=None)


@contextmanager
def noting() -> Iterator[dict[str, str]]:
    """A dict that collects what the checks in the block allow, in words, by the name of the option."""
    notes: dict[str, str] = {}
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def _note(name: str, allowed: str) -> None:
    """Notes what a check allows. Of several checks of an option, the first one is the narrowest."""
    notes = _notes.get()
    if notes is not None:
        notes.setdefault(name, allowed)


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
    _note(name, f"{kind} in {span}" if high < UNLIMITED else f"{kind} {'above' if open_low else 'of at least'} {low}")
    is_number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    inside = is_number and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type, operator]
    if not inside or (open_low and value == low):
        raise ConfigError(f"{name} must be {kind} in {span}, got {literal(value)}")


def check_clip(name: str, value: object) -> None:
    """ConfigError unless `value` holds the smallest factor of a scale, in (0, 1], and the largest, in [1, 2]."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ConfigError(f"{name} must be a list such as [0.5, 1.1], got {literal(value)}")
    check_range(f"{name}[0]", value[0], 0, 1, open_low=True)
    check_range(f"{name}[1]", value[1], 1, 2)


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """ConfigError unless `value` is one of `allowed`."""
    options = list(allowed)
    names = ", ".join(option if isinstance(option, str) else literal(option) for option in options)
    _note(name, "true or false" if options == [True, False] else f"one of {names}")
    if not any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in options):
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
