"""Turns the columns of a table into inputs and labels, for local tables and hub data sets alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import TYPE_CHECKING, Any

from epmq_cli.data.chats import Chat, text_or_chat
from epmq_cli.data.labels import label_numbers, read_labels
from epmq_cli.data.layouts import Layout, layout_of
from epmq_cli.data.samples import Split
from epmq_cli.data.texts import check_text, prompt_value, text_of
from epmq_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

CONVERSIONS = (None, "s", "r", "a")
KINDS = ("", 0, 0.5)
"""One value of each type that a table may hold, to try a prompt with."""


@dataclass(frozen=True)
class Columns:
    """The columns of a sample.

    `inputs`: one column, or two for pairs of texts; empty until `of` chooses a layout. `prompt`: a text with {column}
    placeholders instead. `label`: the column of the label, None if there is none. `labels`: its values in the order of
    the classes, or None if they are the whole numbers 0, 1, ... `regression`: whether labels are arbitrary numbers.
    `option`: names the option of the inputs. `written`: whether the label is a text, which answers are compared with.
    """

    inputs: tuple[str, ...]
    prompt: str | None
    label: str | None
    labels: Sequence[str | int | bool] | None
    regression: bool
    option: str
    layout: Layout | None = None
    written: bool = False

    def of(self, available: Collection[str], where: str) -> Columns:
        """These columns in a source that has `available`: if the options name no input, the usual columns of text and
        conversations, or else a DataError."""
        if self.inputs:
            return self
        layout = layout_of(available, where, self.option)
        return replace(self, inputs=layout.columns, layout=layout)

    def required(self, split: Split) -> tuple[str, ...]:
        """The columns that a split must have, the label's last. The train split needs no labels."""
        return self.inputs if self.label is None or split == "train" else (*self.inputs, self.label)

    def read(self, split: Split, available: Collection[str]) -> tuple[str, ...]:
        """The columns to read: the required ones, and the label's if the split has it. `available`: the split's."""
        names = [*(self.layout.optional if self.layout else ()), *([] if self.label is None else [self.label])]
        return tuple(dict.fromkeys([*self.required(split), *(name for name in names if name in available)]))

    def texts(self, rows: Iterable[Mapping[str, Any]], where: str) -> list[str | tuple[str, ...]]:
        """The input of each row: a text, a pair of texts, a conversation, or the filled prompt.

        DataError if a row holds no text, or if some rows hold conversations and others texts."""
        inputs = [self._text(row, f"{where}, row {number}") for number, row in enumerate(rows, 1)]
        chat = next((each for each in inputs if isinstance(each, Chat)), None)
        if chat is not None and not all(isinstance(each, Chat) for each in inputs):
            raise DataError(
                f"{chat.where}: column {self.inputs[0]} holds a conversation, and other rows hold texts; put them "
                "into two data sets"
            )
        return inputs

    def _text(self, row: Mapping[str, Any], where: str) -> str | tuple[str, ...]:
        if self.prompt is not None:
            return self._prompted(row, where)
        if self.layout is not None:
            return self.layout.build(row, where)
        if len(self.inputs) == 1:
            return text_or_chat(row, self.inputs[0], where)
        return tuple(text_of(row[name], name, where) for name in self.inputs)

    def _prompted(self, row: Mapping[str, Any], where: str) -> str:
        values = {name: prompt_value(row[name], name, where) for name in self.inputs}
        try:
            return check_text(str(self.prompt).format(**values), where)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{where}: the values do not fit data.prompt {self.prompt!r} ({error}); remove the format after the "
                "column's name in the placeholder"
            ) from error

    def targets(
        self, values: Mapping[str, Sequence[Any]], where: str, split: Split, names: Sequence[str] | None = None
    ) -> tuple[Tensor | None, tuple[str, ...] | None]:
        """The labels of the rows, int64, or float32 for a regression, and the names of their classes; None if
        they are missing.

        `values`: the values of the rows by column. `names`: the source's own names of the labels 0, 1, ... The train
        split needs no labels; its unreadable labels are ignored.
        """
        if self.label is None or self.written or (split == "train" and self.label not in values):
            return None, None
        try:
            return read_labels(values[self.label][:], self.labels, names, self.regression, where)
        except DataError:
            if split == "test":
                raise
            return None, None

    def references(self, values: Mapping[str, Sequence[Any]], where: str, split: Split) -> list[str] | None:
        """The texts that the answers to the rows of the test split are compared with; None if labels are not texts."""
        if self.label is None or not self.written or split == "train":
            return None
        column = enumerate(values[self.label][:], 1)
        return [text_of(value, self.label, f"{where}, row {number}") for number, value in column]

    def check_targets(self, values: Mapping[str, Sequence[Any]], where: str) -> None:
        """Raises DataError if `targets` or `references` would for the test split."""
        if self.written:
            self.references(values, where, "test")
        elif self.label is not None:
            label_numbers(values[self.label], self.labels, None, self.regression, where)


def columns(
    option: str,
    inputs: str | Sequence[str] | None,
    prompt: str | None,
    label: str | None,
    labels: Sequence[str | int | bool] | None,
    regression: bool,
    answer: str | None = None,
) -> Columns:
    """The columns that the options of a source name; ConfigError if they do not make a sample. `answer`: the column of
    a text, in place of a label.

    `option`: the name of the source's option for the input column. `inputs`: None for the usual columns of text and
    conversations.
    """
    if regression and labels is not None:
        raise ConfigError(
            "data.labels names classes, and a regression has none; leave out data.labels or data.regression"
        )
    if answer is not None and (labels is not None or regression):
        raise ConfigError(
            f"data.answer is the column of a text, got {answer}, and data.labels and data.regression are for labels; "
            "leave out the one or the others"
        )
    label, written = answer or label, answer is not None
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs or ())
    option = f"data.{option}"
    if prompt is None:
        if inputs is not None and len(names) not in (1, 2):
            raise ConfigError(f"{option} must be one column or a list of two, got {inputs}")
        return Columns(names, None, label, labels, regression, option, written=written)
    places = _places(prompt)
    if not places or not all(name.isidentifier() for name in places):
        raise ConfigError(f"data.prompt must have placeholders that are columns, such as {{sentence}}, got {prompt!r}")
    return Columns(places, prompt, label, labels, regression, option, written=written)


def _places(prompt: str) -> tuple[str, ...]:
    """The columns that a prompt names; ConfigError if a placeholder fits no value."""
    try:
        parsed = [place[1:] for place in Formatter().parse(prompt) if place[1] is not None]
    except ValueError as error:
        raise ConfigError(
            f"data.prompt must be a text with {{column}} placeholders, got {prompt!r} ({error})"
        ) from error
    for name, layout, conversion in parsed:
        if conversion not in CONVERSIONS or not _is_layout(str(layout)):
            raise ConfigError(
                f"data.prompt must be a text with {{column}} placeholders, got {prompt!r}, where {{{name}}} has a "
                "format that fits no value; remove the format, or write {{ and }} for literal braces"
            )
    return tuple(dict.fromkeys(str(name) for name, _, _ in parsed))


def _is_layout(layout: str) -> bool:
    """Whether `format` accepts the format for a value of some type."""
    for value in KINDS:
        try:
            format(value, layout)
            return True
        except (ValueError, TypeError, OverflowError):
            continue
    return False
