"""From the columns of a table to inputs and labels: what local tables and hub data sets share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from epmq_cli.errors import ConfigError, DataError


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

    def text(self, row: Mapping[str, Any]) -> str | tuple[str, ...]:
        """The text of a row, its pair of texts, or the prompt with the row's values in place."""
        if self.prompt is not None:
            return self.prompt.format(**{name: row[name] for name in self.inputs})
        texts = tuple(str(row[name]) for name in self.inputs)
        return texts[0] if len(texts) == 1 else texts

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
    try:
        places = tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(prompt) if name is not None))
    except ValueError as error:
        raise ConfigError(f"data.prompt must be a text with {{column}} places, got {prompt!r} ({error})") from error
    if not places or not all(name.isidentifier() for name in places):
        raise ConfigError(f"data.prompt must name columns in its places, such as {{sentence}}, got {prompt!r}")
    return Columns(places, prompt, label, labels, regression)


def label_indices(values: Sequence[Any], labels: Sequence[str | int] | None, where: str) -> Tensor:
    """int64 (len(values),): the position of each value in `labels`, or the value itself where that is None."""
    if labels is not None:
        index = {str(label): position for position, label in enumerate(labels)}
        unknown = next((value for value in values if str(value) not in index), None)
        if unknown is not None:
            raise DataError(f"{where}: label {unknown!r} is not among data.labels, which are {', '.join(index)}")
        return torch.tensor([index[str(value)] for value in values], dtype=torch.int64)
    try:
        return torch.tensor([int(value) for value in values], dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: labels must be whole numbers from 0; name their values in data.labels ({error})"
        ) from error


def label_numbers(values: Sequence[Any], where: str) -> Tensor:
    """float32 (len(values),): the values as numbers."""
    try:
        return torch.tensor([float(value) for value in values], dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: with data.regression every label must be a number ({error})") from error
