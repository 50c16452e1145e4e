"""Matches the labels of a task's data with the classes of its head, by name.

A head has the order of its training or of the suite; a data source has its own order, such as that of sorted class
folders. If both have names, labels are translated into the order of the head. If one has no names, labels match by
position, and epmq says so. If names contradict each other, epmq raises DataError, because any position could be wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from epmq_cli.data.samples import Samples
from epmq_cli.data.suite import POSITION, Task
from epmq_cli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = re.compile(r"label_?(\d+)", re.IGNORECASE)
"""The names that transformers gives to unnamed classes."""
NUMBER = re.compile(r"-?\d+")
SHOWN = 8  # names of a long list in a message
QUIRKS = 0.1  # the share of names, common to prompts and data, that may be at other positions
SHORT = 3  # minimum letters of an abbreviation

Order = tuple[int | None, ...]
"""The class of the head for each label of the data; None if the head lacks the class."""


@dataclass(frozen=True)
class Heading:
    """The classes of a task's head.

    `names`: in order; None if it has none, such as a LoRA adapter or a head with the default LABEL_0, LABEL_1, ...
    `count`: the number of classes; None if it is unknown. `own`: whether the head was trained with the expert,
    so that its names are those of its training data; others are prompts or answers, which data may spell differently.
    """

    task: str
    names: tuple[str, ...] | None
    count: int | None
    own: bool


@dataclass(frozen=True)
class Match:
    """The order that translates labels of the data; None to match by position. `message`: the message for the user."""

    order: Order | None
    message: str | None = None


def in_order_of_head(samples: Samples, heading: Heading, task: Task) -> Match:
    """The match for the labels of a task's test samples; DataError if names contradict each other.

    If the source has no names, the classes of the suite, in label order, are those of the data.
    """
    data = samples.classes or task.classes
    if task.match_labels == POSITION or (data == heading.names and data is not None):
        return Match(None)
    if data is None and samples.labels is not None and (by_value := _by_value(heading, samples.labels)):
        return by_value
    return match(heading, data, getattr(task.data, "labels", None) is not None)


def _by_value(heading: Heading, labels: Tensor) -> Match | None:
    """The match for unnamed labels if the names of the head's classes are numbers other than 0, 1, ..., such as 1 to 5,
    and include the labels; else None. DataError if the labels could be positions as well."""
    numbers = _numbers(heading.names or ())
    if numbers is None or not len(labels) or sorted(numbers) == list(range(len(numbers))):
        return None
    present = set(labels.tolist())
    if not present <= set(numbers):
        return None
    if present <= set(range(len(numbers))):
        raise DataError(
            f"task {heading.task}: the labels {listing(sorted(map(str, present)))} may be the classes of these names, "
            f"or those at these positions of {listing(heading.names or ())}; list the data's values in data.labels, in "
            f"the order of the classes, or set suite.tasks.{heading.task}.match_labels: position"
        )
    if min(present) < 0:
        return None
    order = tuple(numbers.index(label) if label in numbers else None for label in range(max(present) + 1))
    return Match(order, f"labels are the names of the head's classes, {listing(heading.names or ())}")


def translated(samples: Samples, order: Order | None, heading: Heading) -> Samples:
    """The samples with labels in the order of the head; DataError if one is not a class of the head."""
    if order is None or samples.labels is None:
        return samples
    present = set(samples.labels.tolist())
    beyond = [label for label in sorted(present) if not 0 <= label < len(order)]
    unknown = [label for label, place in enumerate(order) if place is None and label in present]
    if beyond or unknown:
        name = beyond[0] if beyond else (samples.classes or ())[unknown[0]]
        raise DataError(
            f"task {heading.task}: the test samples have the label {name}, which is not among the classes "
            f"{listing(heading.names or ())}"
        )
    table = torch.tensor([-1 if place is None else place for place in order], dtype=torch.int64)
    return replace(samples, labels=table[samples.labels], classes=heading.names)


def match(heading: Heading, data: tuple[str, ...] | None, listed: bool = False) -> Match:
    """The match for labels with these names (None for unnamed ones); DataError if names contradict each other.
    `listed`: whether the suite gives the data's names and thus their order."""
    head = heading.names
    if data is None:
        numbers = _numbers(head or ())
        if numbers is not None and sorted(numbers) == list(range(len(numbers))):
            return _by_order(heading, tuple(map(str, range(len(numbers)))), numbers_first(numbers))
        if head is None or not heading.own:
            return Match(None)
        return Match(
            None, f"labels 0 to {len(head) - 1} are taken as {listing(head)}, in the order of the expert's config"
        )
    if head is None:
        return _unnamed_head(heading, data, listed)
    head_keys, data_keys = _keys(head, data)
    if head_keys is None or data_keys is None:
        return _incomparable(heading, data, "a name occurs twice")
    head_numbers, data_numbers = _numbers(head), _numbers(data)
    if data_numbers is not None and head_numbers is None:
        return _numbered_data(heading, data, data_numbers, listed)
    if head_numbers is not None and data_numbers is None:
        _check_numbered_head(heading, data, head_numbers)
        return _incomparable(heading, data, "the classes of the head are numbers")
    order = tuple(head_keys.index(key) if key in head_keys else None for key in data_keys)
    return _by_order(heading, data, _with_abbreviations(order, head_keys, data_keys))


def _check_numbered_head(heading: Heading, data: tuple[str, ...], numbers: Sequence[int]) -> None:
    """Raises DataError if the names of the head are unsorted numbers and those of the data are words."""
    if list(numbers) != sorted(numbers):
        raise DataError(
            f"task {heading.task}: the classes of the head are numbers in another order, "
            f"{listing(heading.names or ())}, and the data has {listing(data)}; name the classes in the "
            "expert's config.json (id2label), or list the data's values in the order of the head and set "
            f"suite.tasks.{heading.task}.match_labels: position"
        )


def numbers_first(numbers: Sequence[int]) -> Order:
    """The position of each of the numbers 0, 1, ... in a list of all of them."""
    return tuple(numbers.index(number) for number in range(len(numbers)))


def _by_order(heading: Heading, data: tuple[str, ...], order: Order) -> Match:
    """The match by name; `order` gives the class of the head for each label of the data."""
    head = heading.names or ()
    matches = [label for label, place in enumerate(order) if place is not None]
    moved = [label for label in matches if order[label] != label]
    if len(matches) == len(data) and not moved:
        extra = head[len(data) :]
        return Match(None, f"the head also has {listing(extra)}, which the data does not have" if extra else None)
    if len(matches) == len(data) or (len(matches) == len(head) and not heading.own):
        return Match(order, f"classes are matched by name: the data has {listing(data)}, the head {listing(head)}")
    if heading.own or len(data) != len(head) or len(moved) > QUIRKS * len(matches):
        raise DataError(_contradiction(heading, data, len(matches)))
    if matches:
        differ = [f"{data[label]} as {head[label]}" for label, place in enumerate(order) if place != label]
        return Match(None, f"labels are matched by position, {listing(differ)}; the other names are the same")
    return Match(None, f"labels are matched by position: {listing(data)} as {listing(head)}, which share no name")


def _with_abbreviations(order: Order, head: Sequence[str], data: Sequence[str]) -> Order:
    """The order completed by names with a common start, such as neg and negative, if each remaining label gets a
    different class; else the order itself."""
    rest = {place: head[place] for place in range(len(head)) if place not in order}
    places = dict(enumerate(order))
    for label in (label for label, place in enumerate(order) if place is None):
        alike = [place for place, name in rest.items() if _alike(name, data[label])]
        if len(alike) != 1:
            return order
        places[label] = alike[0]
    return tuple(places.values()) if len(set(places.values())) == len(places) else order


def _alike(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return len(short) >= SHORT and long.startswith(short)


def _unnamed_head(heading: Heading, data: tuple[str, ...], listed: bool) -> Match:
    """The match for a head without names: by the default names, if the data has those; else by position."""
    if heading.count is not None and all(map(DEFAULT.fullmatch, data)):
        names = tuple(f"LABEL_{index}" for index in range(heading.count))
        order = tuple(names.index(name.upper()) if name.upper() in names else None for name in data)
        return _by_order(replace(heading, names=names), data, order)
    _check_sorted(heading, data, _numbers(data), listed)
    return _incomparable(heading, data, "the expert does not name its classes")


def _numbered_data(heading: Heading, data: tuple[str, ...], numbers: Sequence[int], listed: bool) -> Match:
    """The match for data named by numbers: by the numbers in names such as "1 star"; else by position."""
    head = heading.names or ()
    parts = [NUMBER.findall(name) for name in head]
    if all(len(part) == 1 for part in parts):
        held = [int(part[0]) for part in parts]
        if len(set(held)) == len(held) and set(numbers) <= set(held):
            return _by_order(heading, data, tuple(held.index(number) for number in numbers))
    _check_sorted(heading, data, numbers, listed)
    return _incomparable(heading, data, "the labels of the data are numbers")


def _check_sorted(heading: Heading, data: tuple[str, ...], numbers: Sequence[int] | None, listed: bool) -> None:
    """Raises DataError if the names of the data are unsorted numbers, such as the folders 0, 1, 10, 2: the position of
    a class in the head is then ambiguous. `listed`: whether the user gave the order."""
    if numbers is not None and list(numbers) != sorted(numbers) and not listed:
        classes = f"its classes are {listing(heading.names)}" if heading.names else "its head names no classes"
        raise DataError(
            f"task {heading.task}: the labels of the data are numbers in another order, {listing(data)}, and {classes}"
            "; list the data's values in the order of the head in data.labels"
        )


def _incomparable(heading: Heading, data: tuple[str, ...], why: str) -> Match:
    """The match by position; DataError if a trained head has another number of classes than the data."""
    if heading.own and heading.count is not None and heading.count != len(data):
        raise DataError(
            f"task {heading.task}: its head has {heading.count} classes and the data {len(data)}, {listing(data)}; "
            f"name them in data.labels in the order of the head, or set suite.tasks.{heading.task}.match_labels: "
            "position if the first labels are the first classes"
        )
    if heading.names is None:
        return Match(None, f"labels are matched by position ({listing(data)}) and could not be compared, because {why}")
    return Match(None, f"labels are matched by position, {listing(data)} as {listing(heading.names)}, because {why}")


def _contradiction(heading: Heading, data: tuple[str, ...], common: int) -> str:
    of = "the expert's config.json has the classes" if heading.own else "the suite has the classes"
    much = f"only {common} of the names are in both" if common else "no name is in both"
    return (
        f"task {heading.task}: {of} {listing(heading.names or ())} and the data {listing(data)}, where {much}; list "
        f"the data's values in the order of the classes in data.labels and set suite.tasks.{heading.task}.match_labels"
        ": position, or use the same names"
    )


def _keys(head: tuple[str, ...], data: tuple[str, ...]) -> tuple[list[str] | None, list[str] | None]:
    """Both lists in the form for comparison: folded, or unchanged if folding makes two names equal; None if a name
    occurs twice even then."""
    for key in (fold, str.strip):
        both = [[key(name) for name in names] for names in (head, data)]
        if all(len(set(keys)) == len(keys) for keys in both):
            return both[0], both[1]
    return None, None


def fold(name: str) -> str:
    """The name without case, spaces, `_` and `-`; a whole number in its usual form."""
    name = unicodedata.normalize("NFKC", name).strip()
    if NUMBER.fullmatch(name):
        return str(int(name))
    default = DEFAULT.fullmatch(name)
    return f"label{int(default[1])}" if default else re.sub(r"[\s_-]+", "", name).casefold()


def _numbers(names: Sequence[str]) -> list[int] | None:
    """The names as numbers, such as 1, 0 for LABEL_1, LABEL_0; None if one is not a number."""
    defaults = [DEFAULT.fullmatch(name.strip()) for name in names]
    texts = [part[1] if part else name.strip() for part, name in zip(defaults, names, strict=True)]
    return [int(text) for text in texts] if texts and all(map(NUMBER.fullmatch, texts)) else None


def listing(names: Sequence[str]) -> str:
    """Names for a sentence; a long list is cut."""
    rest = len(names) - SHOWN
    return ", ".join([*names[:SHOWN], *([f"... ({rest} more)"] if rest > 0 else [])])


def unnamed(names: Sequence[str]) -> bool:
    """Whether names are the defaults of transformers, in order."""
    return all((part := DEFAULT.fullmatch(name)) is not None and int(part[1]) == i for i, name in enumerate(names))
