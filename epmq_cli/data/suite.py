"""A suite: a base model, its experts, and the tasks with their data and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epmq_cli.config.field_types import check_types
from epmq_cli.config.validate import check_choice, check_keys, check_range
from epmq_cli.data.ranking import RANKINGS
from epmq_cli.data.samples import Source
from epmq_cli.data.tokenizer_option import TokenizerOption, tokenizer_option
from epmq_cli.errors import ConfigError, literal, placed

MAX_LENGTH = 128
TEXT_METRICS = ("exact_match", "wer")
"""Metrics of texts that a model writes, given other texts."""
METRICS = ("accuracy", "matthews", "spearman", "pearson", "perplexity", *TEXT_METRICS, *RANKINGS)
ANSWER = 10  # maximum tokens of an answer that names a class, including the start token, as in the published protocol
WRITTEN = 128  # maximum tokens of other answers
VOCABULARIES = ("same", "pad")
NAME, POSITION = "name", "position"
PROCESSORS = ("expert", "base", "same")
HEADS = ("base", "expert")


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    `expert`: a model folder or hub id. `data`: the source of the samples. `classes`: class names in label order, or
    the answers of a task that is answered in words. `templates`: prompts with {} for the class name. `max_length`:
    the maximum length of texts, in tokens. `metric`: one of METRICS. `documents`: the maximum number of documents to
    read for calibration on running text. `packing`: whether calibration cuts its sequences out of all documents, one
    after the other; false: each sequence is one document or conversation, cut at `max_length` and padded.
    `match_labels`: whether labels of the data match classes of the head by `name`, if both have names, or by
    `position`. `answer_length`: the maximum tokens of a generated answer, including the start token; None for ANSWER,
    or for WRITTEN if it is compared with a text. `processor` and `heads`: see Suite. `stride`: tokens from one window
    of a perplexity to the next; None for `max_length`, windows without overlap. `assistant_only_loss`: whether the
    expert was trained on the assistant's answers only; then the perplexity, and the KL divergence from the expert,
    count only their tokens.
    """

    name: str
    expert: str
    data: Source
    classes: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    max_length: int = MAX_LENGTH
    metric: str = "accuracy"
    documents: int | None = None
    match_labels: str = NAME
    processor: str = PROCESSORS[0]
    heads: str = HEADS[0]
    packing: bool = True
    stride: int | None = None
    answer_length: int | None = None
    assistant_only_loss: bool = False

    def __post_init__(self) -> None:
        where = f"suite.tasks.{self.name}"
        shortest = 2 if self.metric == "perplexity" else 1  # perplexity predicts each token from those before it
        check_range(f"{where}.max_length", self.max_length, shortest, 1 << 20, integer=True)
        if self.stride is not None:
            check_range(f"{where}.stride", self.stride, 1, self.max_length, integer=True)
        if self.answer_length is not None:
            check_range(f"{where}.answer_length", self.answer_length, 2, 1 << 16, integer=True)
        if self.documents is not None:
            check_range(f"{where}.documents", self.documents, 1, 1 << 30, integer=True)
        check_choice(f"{where}.metric", self.metric, METRICS)
        check_choice(f"{where}.match_labels", self.match_labels, (NAME, POSITION))
        check_choice(f"{where}.processor", self.processor, PROCESSORS)
        check_choice(f"{where}.heads", self.heads, HEADS)
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            raise ConfigError(f"{where}.classes must be two or more different names, got {list(self.classes)}")
        for template in self.templates or ():
            if template.count("{}") != 1:
                raise ConfigError(f"{where}.templates must each have one {{}} for the class name, got {template!r}")

    @property
    def written(self) -> int:
        """The maximum tokens of a generated answer."""
        return self.answer_length or (WRITTEN if self.metric in TEXT_METRICS else ANSWER)


@dataclass(frozen=True)
class Suite:
    """`suite=<name>`.

    `family`: the architecture, or `auto` to choose it by the base's config. `base`: a model folder, a hub id, or a name
    of open_clip such as open_clip:ViT-B-32/openai. `tasks`: the fields of Task, by task name; `each` holds fields that
    all tasks share. `experts`: the experts of tasks that name none, as a pattern with {task} or by task name; without
    `tasks`, each expert is a task. `root`: a mirror of the hub, searched first for models, at `<root>/<id>`.
    `vocabulary`: `same` for all models, or `pad` if some have more tokens than others. `processor`: which tokenizer or
    image processor reads the samples of a task if the expert's gives other inputs than the base's: the `expert`'s or
    the `base`'s; `same` raises an error. `heads`: whose text tower makes zero-shot heads, the `base`'s or each
    `expert`'s; an expert's projection is then merged too. A task, or `each`, may have its own `processor` and `heads`.
    `tokenizer`: None if all models have the base's tokens; otherwise see TokenizerOption.
    """

    name: str
    family: str
    base: str
    tasks: Mapping[str, Mapping[str, Any] | None]
    experts: str | Mapping[str, str] | None = None
    each: Mapping[str, Any] | None = None
    vocabulary: str = "same"
    root: str | None = None
    processor: str = PROCESSORS[0]
    heads: str = HEADS[0]
    tokenizer: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_types("suite", Suite, vars(self))  # checked again, since a _target_ among the tasks may replace them
        check_choice("suite.vocabulary", self.vocabulary, VOCABULARIES)
        check_choice("suite.processor", self.processor, PROCESSORS)
        check_choice("suite.heads", self.heads, HEADS)
        if not self.entries:
            raise ConfigError(
                "suite.tasks must name at least one task, or suite.experts the experts by task name, got "
                f"{literal(self.tasks)} and {literal(self.experts)}"
            )
        if isinstance(self.experts, str) and self.experts.count("{task}") != 1:
            raise ConfigError(f"suite.experts must have one {{task}} for the task's name, got {self.experts!r}")
        if isinstance(self.experts, Mapping):
            check_keys("suite.experts", self.experts, self.entries)
        check_keys("suite.each", self.each or {}, TASK_FIELDS)
        if (self.each or {}).get("data") is not None:
            _check_source("suite.each.data", (self.each or {})["data"])
        _ = self.members, self.merged_tokenizer

    @property
    def merged_tokenizer(self) -> TokenizerOption | None:
        """The tokenizer of the result if rows of tables are matched by token; None if by number."""
        return tokenizer_option(self.tokenizer, list(self.entries))

    @property
    def members(self) -> list[Task]:
        """The tasks in order; ConfigError if one is invalid."""
        shared, entries = {"processor": self.processor, "heads": self.heads}, self.entries
        return [_task(name, entry, {**shared, "expert": self._expert(name, entry)}) for name, entry in entries.items()]

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """The fields of each task, including those that all tasks share."""
        names: Mapping[str, Any] = self.tasks or (self.experts if isinstance(self.experts, Mapping) else {})
        return {str(name): _filled(str(name), self.tasks.get(name) or {}, self.each or {}) for name in names}

    def _expert(self, name: str, entry: Mapping[str, Any]) -> str:
        if entry.get("expert") is not None:
            expert: str = entry["expert"]
            return expert
        if isinstance(self.experts, str):
            return self.experts.replace("{task}", name)
        if self.experts and name in self.experts:
            return self.experts[name]
        raise ConfigError(
            f"task {name} has no expert; set suite.tasks.{name}.expert, or suite.experts to a pattern with {{task}}"
        )

    @property
    def metrics(self) -> dict[str, str]:
        """The metric of each task."""
        return {task.name: task.metric for task in self.members}


TASK_FIELDS = [field.name for field in dataclasses.fields(Task) if field.name != "name"]
"""The fields that a suite may set for a task."""


def _filled(name: str, entry: Mapping[str, Any], each: Mapping[str, Any]) -> dict[str, Any]:
    """A task's fields on top of the shared ones; the fields of its data are merged likewise."""
    filled = {**each, **entry}
    shared, own = each.get("data"), entry.get("data")
    if dataclasses.is_dataclass(shared) and not isinstance(shared, type) and isinstance(own, Mapping):
        check_keys(f"suite.tasks.{name}.data", own, [field.name for field in dataclasses.fields(shared)])
        check_types(f"suite.tasks.{name}.data", type(shared), own)
        try:
            filled["data"] = dataclasses.replace(shared, **own)
        except ConfigError as error:
            raise placed(error, f"suite.tasks.{name}.data") from None
    return filled


def _task(name: str, entry: Mapping[str, Any], shared: Mapping[str, Any]) -> Task:
    """Builds a task. `shared`: values of fields that the entry does not set."""
    where = f"suite.tasks.{name}"
    fields = {**entry, **{key: value for key, value in shared.items() if entry.get(key) is None}}
    check_keys(where, entry, TASK_FIELDS, required=("data",))
    fields |= {key: _texts(entry[key]) for key in ("classes", "templates") if key in entry}
    check_types(where, Task, fields)
    _check_source(f"{where}.data", entry["data"])
    return Task(name=name, **fields)


def _check_source(where: str, data: Any) -> None:
    if not hasattr(data, "load"):
        raise ConfigError(
            f"{where} needs a _target_ such as epmq_cli.data.table.Table (see docs/suites.md), got {literal(data)}"
        )


def _texts(value: Any) -> Any:
    """A list with its numbers as texts, since classes may be digits; any other value unchanged."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(str(item) if isinstance(item, (int, float)) and not isinstance(item, bool) else item for item in value)
