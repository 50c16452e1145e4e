"""Checks the values of a config against the annotated types of its class."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from epmq_cli.errors import ConfigError, literal

ONE = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
MANY = {bool: "true or false", int: "whole numbers", float: "numbers", str: "text", type(None): "null"}
"""The names of types in messages, for one value and for several."""


def required(kind: type) -> list[str]:
    """The fields of a dataclass that have no default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return [field.name for field in fields if field.default is missing and field.default_factory is missing]


def check_types(where: str, kind: type, values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError if a value does not have the type of the dataclass's field of that name.

    `names`: the names of keys in errors, in place of `where` and the key.
    """
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        check_type((names or {}).get(name, f"{where}.{name}"), hints[name], value)


def check_type(name: str, hint: Any, value: Any) -> None:
    """Raises ConfigError if a value does not have an annotated type."""
    if not fits(value, hint):
        raise ConfigError(f"{name} must be {described(hint)}, got {literal(value)}{_remedy(value, hint)}")


def _remedy(value: Any, hint: Any) -> str:
    """The remedy for names that YAML does not read as text; empty for other values."""
    if isinstance(value, (bool, int, float)) and fits("text", hint):
        return "; put it in quotes if it is a name"
    if isinstance(value, (list, tuple)) and any(isinstance(item, bool) for item in value) and fits(["text"], hint):
        return "; YAML reads yes, no, on and off as true and false, so put them in quotes"
    return ""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type. Empty text does not fit `str`. Whole numbers fit `float`; true and false
    do not. Every value fits types that YAML does not have, such as protocols."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin in (tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(item, arguments[0]) for item in value)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(item, arguments[1]) for item in value.values())
    if hint is str:
        return isinstance(value, str) and value.strip() != ""
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in ONE else True


def described(hint: Any, many: bool = False) -> str:
    """Describes an annotated type in words, for one value or several."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(described(argument, many) for argument in arguments)
    if origin in (tuple, Sequence):
        return "lists" if many else f"a list of {described(arguments[0], many=True)}"
    if origin is Literal:
        return " or ".join(arguments)
    if origin is Mapping:
        return "mappings" if many else f"a mapping from names to {described(arguments[1], many=True)}"
    return (MANY if many else ONE).get(hint, "values")
