"""Two tiers of tests: the default tier takes one or two cases of a matrix, `slow` takes all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import pytest


class HasKind(Protocol):
    """A case of a matrix over kinds of models."""

    @property
    def kind(self) -> str: ...

    def __hash__(self) -> int: ...


Case = TypeVar("Case", bound=HasKind)


def slow(value: Any) -> Any:
    """Marks a value of `parametrize`, or a tuple of values, as slow."""
    if isinstance(value, type(pytest.param())):
        return pytest.param(*value.values, marks=[*value.marks, pytest.mark.slow], id=value.id)
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def first(number: int, values: Iterable[Any]) -> list[Any]:
    """The values of a matrix; the first ones run by default, the others are slow."""
    return [value if index < number else slow(value) for index, value in enumerate(values)]


def every(step: int, values: Iterable[Any]) -> list[Any]:
    """The values of a list of cases; each `step`-th one runs by default, the others are slow."""
    return [value if index % step == 0 else slow(value) for index, value in enumerate(values)]


def only(names: Iterable[str], values: Iterable[Any]) -> list[Any]:
    """The values of a matrix; those with these names run by default, the others are slow."""
    fast = set(names)
    return [value if value in fast else slow(value) for value in values]


def covering(cases: Iterable[Case], axes: Sequence[str]) -> set[Case]:
    """A small set of cases that has each value of each of these attributes; among equals, kinds take turns."""
    values = {case: {(axis, getattr(case, axis)) for axis in axes} for case in cases}
    missing, chosen, uses = set().union(*values.values()), set[Case](), Counter[str]()
    while missing:
        best = max(values, key=lambda case: (len(values[case] & missing), -uses[case.kind]))
        missing -= values[best]
        uses[best.kind] += 1
        chosen.add(best)
    return chosen
