"""From the columns of a table to inputs and labels: what local tables and hub data sets share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from epmq_cli.data.chats import Chat, chat_of, stored
from epmq_cli.data.texts import check_text, prompt_value, text_of
from epmq_cli.errors import ConfigError, DataError, shown

MOST = 1 << 63  # int64 has the whole numbers below
LARGEST = torch.finfo(torch.float32).max
CONVERSIONS = (None, "s", "r", "a")
KINDS = ("", 0, 0.5)
"""Of each kind of value that a table may have, one to try a prompt with."""


@dataclass(frozen=True)
class Columns:
    """Which columns make up a sample.

    `inputs`: one column, or two for pairs of texts. `prompt`: a text with {column} places instead. `label`: the column
    of the label, None for running text, whose labels are 0; `labels` its values in the order of the classes, or None
    where they are the whole numbers 0, 1, ... themselves; `regression`: labels are numbers of any size.
    """

    inputs: tuple[str, ...]
    prompt: str | None
    label: str | None
    labels: Sequence[str | int] | None
    regression: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Every column that is read, the label's last."""
        return self.inputs if self.label is None else (*self.inputs, self.label)

    def texts(self, rows: Iterable[Mapping[str, Any]], where: str) -> list[str | tuple[str, ...]]:
        """Of each row its text, its pair of texts, its conversation, or the prompt with its values in place; DataError
        where it holds none that a tokenizer can take, or one row a conversation and another a text."""
        found = [self._text(row, f"{where}, row {number}") for number, row in enumerate(rows, 1)]
        chat = next((each for each in found if isinstance(each, Chat)), None)
        if chat is not None and not all(isinstance(each, Chat) for each in found):
            raise DataError(
                f"{chat.where}: column {self.inputs[0]} holds a conversation, and others of its rows hold texts; put "
                "them into two data sets"
            )
        return found

    def _text(self, row: Mapping[str, Any], where: str) -> str | tuple[str, ...]:
        if self.prompt is not None:
            return self._prompted(row, where)
        if len(self.inputs) == 1 and isinstance(value := stored(row[self.inputs[0]]), list | tuple):
            return chat_of(value, self.inputs[0], where)
        texts = tuple(text_of(row[name], name, where) for name in self.inputs)
        return texts[0] if len(texts) == 1 else texts

    def _prompted(self, row: Mapping[str, Any], where: str) -> str:
        values = {name: prompt_value(row[name], name, where) for name in self.inputs}
        try:
            return check_text(str(self.prompt).format(**values), where)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{where}: the values do not go into data.prompt {self.prompt!r} ({error}); leave out what follows a "
                "column's name in its place"
            ) from error

    def targets(self, values: Mapping[str, Sequence[Any]], where: str) -> Tensor:
        """The labels that rows with these values by column have: int64, or float32 for a regression."""
        if self.label is None:
            return torch.zeros(len(values[self.inputs[0]]), dtype=torch.int64)
        return self._numbers(values[self.label][:], where)

    def _numbers(self, values: Sequence[Any], where: str) -> Tensor:
        return label_numbers(values, where) if self.regression else label_indices(values, self.labels, where)


def columns(
    option: str,
    inputs: str | Sequence[str],
    prompt: str | None,
    label: str | None,
    labels: Sequence[str | int] | None,
    regression: bool,
) -> Columns:
    """The columns that a source names; `option` is what it calls the input's. ConfigError where they make no sample."""
    if regression and labels is not None:
        raise ConfigError("data.labels are names of classes, data.regression has none; leave one of them out")
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    if prompt is None:
        if len(names) not in (1, 2):
            raise ConfigError(f"data.{option} must be one column or a list of two, got {inputs}")
        return Columns(names, None, label, labels, regression)
    places = _places(prompt)
    if not places or not all(name.isidentifier() for name in places):
        raise ConfigError(f"data.prompt must name columns in its places, such as {{sentence}}, got {prompt!r}")
    return Columns(places, prompt, label, labels, regression)


def _places(prompt: str) -> tuple[str, ...]:
    """The columns that a prompt names; ConfigError where no value could be put there."""
    try:
        parsed = [place[1:] for place in Formatter().parse(prompt) if place[1] is not None]
    except ValueError as error:
        raise ConfigError(f"data.prompt must be a text with {{column}} places, got {prompt!r} ({error})") from error
    for name, layout, conversion in parsed:
        if conversion not in CONVERSIONS or not _is_layout(str(layout)):
            raise ConfigError(
                f"data.prompt must be a text with {{column}} places, got {prompt!r}, where {{{name}}} has a layout "
                "that no value can have; leave it out"
            )
    return tuple(dict.fromkeys(str(name) for name, _, _ in parsed))


def _is_layout(layout: str) -> bool:
    """Whether `format` takes it for some kind of value."""
    for value in KINDS:
        try:
            format(value, layout)
            return True
        except (ValueError, TypeError, OverflowError):
            continue
    return False


def label_indices(values: Sequence[Any], labels: Sequence[str | int] | None, where: str) -> Tensor:
    """int64 (len(values),): the position of each value in `labels`, or the value itself where that is None; of a column
    of nothing but true and false, as PatchCamelyon's, 1 and 0."""
    if labels is None and all(isinstance(value, bool) for value in values):
        return torch.tensor(values, dtype=torch.int64)
    if labels is None:
        return torch.tensor([_whole(value, where) for value in values], dtype=torch.int64)
    index = {str(label): position for position, label in enumerate(labels)}
    unknown = next((value for value in values if str(value) not in index), None)
    if unknown is not None:
        raise DataError(f"{where}: label {unknown!r} is not among data.labels, which are {', '.join(index)}")
    return torch.tensor([index[str(value)] for value in values], dtype=torch.int64)


def _whole(value: Any, where: str) -> int:
    """A label as a whole number: 1, 1.0 and "1" are one; 1.7, true among numbers and infinity are none."""
    try:
        number = int(value)
        if not isinstance(value, (bool, bytes)) and abs(number) < MOST and (isinstance(value, str) or number == value):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(
        f"{where}: labels must be whole numbers from 0, got {shown(value)}; name their values in data.labels"
    )


def label_numbers(values: Sequence[Any], where: str) -> Tensor:
    """float32 (len(values),): the values as numbers."""
    return torch.tensor([_number(value, where) for value in values], dtype=torch.float32)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
        if not isinstance(value, bool) and math.isfinite(number) and abs(number) <= LARGEST:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(f"{where}: with data.regression every label must be a finite number, got {shown(value)}")
