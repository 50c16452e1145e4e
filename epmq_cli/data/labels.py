"""Turns the values of a label column into class indices or numbers, with the names of the classes."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.errors import DataError, literal

if TYPE_CHECKING:
    from torch import Tensor

MOST = 1 << 63  # int64 holds the whole numbers below
LARGEST = (2 - 2**-23) * 2.0**127  # of float32
WITHOUT = "eval.stages=[] merges and calibrates without scoring"
YAML_WORDS = (("no", "yes"), ("off", "on"), ("false", "true"))
"""Words that YAML reads as false and true unless they are quoted."""
UNLABELLED = -1
"""The label of unlabelled samples in data sets of the hub."""

Classes = tuple[str, ...] | None


def read_labels(
    values: Sequence[Any],
    labels: Sequence[str | int | bool] | None,
    names: Sequence[str] | None,
    regression: bool,
    where: str,
) -> tuple[Tensor, Classes]:
    """The labels (len(values),), int64, of a regression float32, and the names of the classes: see `label_numbers`."""
    numbers, classes = label_numbers(values, labels, names, regression, where)
    return torch.tensor(numbers, dtype=torch.float32 if regression else torch.int64), classes


def label_numbers(
    values: Sequence[Any],
    labels: Sequence[str | int | bool] | None,
    names: Sequence[str] | None,
    regression: bool,
    where: str,
) -> tuple[Sequence[float], Classes]:
    """The labels as numbers, and the names of the classes in order, None if they are unknown.

    `labels`: the values in the order of the classes. `names`: the source's own names of the values 0, 1, ...
    """
    _check_single(values, where)
    if regression:
        return [_number(value, where) for value in values], None
    if names is not None:
        return _named(values, labels, names, where)
    if labels is None:
        return _indices(values, where), None
    spelled = _spelled(labels, values)
    return _positions(values, spelled, where), tuple(spelled)


def _check_single(values: Sequence[Any], where: str) -> None:
    """DataError if a row has no label, or several."""
    for number, value in enumerate(values, 1):
        if isinstance(value, (list, tuple, dict)):
            kind = "an object" if isinstance(value, dict) else "a list"
            raise DataError(
                f"{where}, row {number}: the label {literal(value)} is {kind}; epmq scores single-label tasks, not "
                f"multi-label ones; {WITHOUT}"
            )
    empty = [number for number, value in enumerate(values, 1) if _is_empty(value)]
    if empty:
        raise DataError(
            f"{where}, row {empty[0]}: the row has no label ({len(empty)} of {len(values)} rows have none); remove "
            f"these rows or add their labels; {WITHOUT}"
        )


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _named(
    values: Sequence[Any], labels: Sequence[str | int | bool] | None, names: Sequence[str], where: str
) -> tuple[list[int], Classes]:
    """Labels whose values 0, 1, ... have names, which `labels` may list in another order; -1 means unlabelled."""
    indices = _indices(values, where)
    if indices and not UNLABELLED <= min(indices) <= max(indices) < len(names):
        raise DataError(
            f"{where}: the labels are {min(indices)}..{max(indices)}, but {len(names)} classes have names, "
            f"{', '.join(names)}; fetch it again"
        )
    if labels is None:
        return indices, tuple(names)
    spelled = _spelled(labels, names)
    if not set(spelled) & set(names):  # labels lists values, not names
        return _positions(values, spelled, where), tuple(spelled)
    labelled = [index for index in indices if index != UNLABELLED]
    positions = iter(_positions([names[index] for index in labelled], spelled, where))
    return [index if index == UNLABELLED else next(positions) for index in indices], tuple(spelled)


def _spelled(labels: Sequence[str | int | bool], values: Collection[Any]) -> list[str]:
    """The values of the classes as texts. Values that YAML read as true and false are spelled as in the data."""
    texts = {value.casefold(): value for value in values if isinstance(value, str)}
    words = next((pair for pair in YAML_WORDS if texts and set(texts) <= {*pair}), None)
    if words is None or not all(isinstance(label, bool) for label in labels):
        return [_text(label) for label in labels]
    return [texts.get(words[int(label)], words[int(label)]) for label in labels]


def _text(value: Any) -> str:
    """A value as text; whole numbers of all types get the same text."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _loosely(value: Any) -> str:
    """A value as text without case and surrounding spaces; 1.0 becomes 1."""
    text = unicodedata.normalize("NFKC", _text(value)).strip().casefold()
    whole, point, rest = text.partition(".")
    return whole if point and whole.removeprefix("-").isdecimal() and not rest.strip("0") else text


def _key(values: Sequence[Any], labels: Sequence[str]) -> Callable[[Any], str]:
    """The comparison of values with labels: exact, or loose if some values do not match exactly and no two labels are
    loosely equal."""
    exact = all(_text(value) in labels for value in set(map(_text, values)))
    return _text if exact or len(set(map(_loosely, labels))) < len(labels) else _loosely


def _positions(values: Sequence[Any], labels: Sequence[str], where: str) -> list[int]:
    """The position of each value in `labels`."""
    key = _key(values, labels)
    index = {key(label): position for position, label in enumerate(labels)}
    unknown = next((value for value in values if key(value) not in index), None)
    if unknown is not None:
        quotes = "; YAML reads the words yes, no, on and off as true and false, so quote them"
        hint = quotes if {"True", "False"} & set(labels) else ""
        raise DataError(f"{where}: label {unknown!r} is not among data.labels, which are {', '.join(labels)}{hint}")
    return [index[key(value)] for value in values]


def _indices(values: Sequence[Any], where: str) -> list[int]:
    """The values themselves. A column of booleans, as in PatchCamelyon, becomes 1 and 0."""
    if all(isinstance(value, bool) for value in values):
        return [int(value) for value in values]
    return [_whole(value, where) for value in values]


def _whole(value: Any, where: str) -> int:
    """A label as a whole number: 1, 1.0, "1" and "1.0" are accepted; 1.7, infinity and true among numbers are not."""
    try:
        exact = (float(value) if "." in value else int(value)) if isinstance(value, str) else value
        number = int(exact)
        if not isinstance(value, (bool, bytes)) and abs(number) < MOST and number == exact:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(
        f"{where}: labels must be whole numbers from 0, got {literal(value)}; list the values in data.labels, or set "
        "data.regression: true and metric: spearman for a regression"
    )


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
        if not isinstance(value, bool) and math.isfinite(number) and abs(number) <= LARGEST:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(f"{where}: with data.regression every label must be a finite number, got {literal(value)}")
