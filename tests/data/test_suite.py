"""Oracle: the rules of the README for suites."""

from __future__ import annotations

import re
from typing import Any

import pytest

from epmq_cli.data.images import Npz
from epmq_cli.data.suite import MAX_LENGTH, Suite
from epmq_cli.data.table import Table
from epmq_cli.errors import ConfigError


def suite(**task: Any) -> Suite:
    return Suite(name="s", family="clip", base="b", tasks={"t": {"expert": "e", "data": Npz("x.npz"), **task}})


def test_tasks_become_members_in_order() -> None:
    entry = {"expert": "e", "data": Npz("x.npz")}
    members = Suite(name="s", family="clip", base="b", tasks={"z": entry, "a": entry}).members
    assert [task.name for task in members] == ["z", "a"]
    assert members[0].max_length == MAX_LENGTH


def test_lists_are_converted_to_text() -> None:
    assert suite(classes=[0, 1]).members[0].classes == ("0", "1")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"data": {}}, "suite.tasks.t.data needs a _target_ such as"),
        ({"metric": "f1"}, "suite.tasks.t.metric must be one of accuracy, matthews, spearman, pearson, .*, got 'f1'"),
        ({"max_length": 0}, "suite.tasks.t.max_length must be a whole number"),
        (
            {"templates": ["{} and {}"]},
            "suite.tasks.t.templates must each have one {} for the class name, got '{} and {}'",
        ),
        ({"classes": ["a", "a"]}, "suite.tasks.t.classes must be two or more different names"),
        (
            {"colour": 1},
            "suite.tasks.t has no option 'colour', the options are expert, data, classes, templates, max_length",
        ),
    ],
)
def test_bad_tasks_are_refused(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        suite(**task)


@pytest.mark.parametrize("place", ["tasks", "tasks.t", "each", "experts"])
def test_a_target_in_place_of_a_mapping_is_refused(place: str) -> None:
    source = Npz("x.npz")  # the object of a `_target_`
    fields: dict[str, Any] = {"tasks": {"t": {"expert": "e", "data": source}}}
    fields |= {"tasks": {"t": source}} if place == "tasks.t" else {place: source}
    with pytest.raises(ConfigError, match=rf"suite.{place.partition('.')[0]} must be .*a mapping.*, got "):
        Suite(name="s", family="clip", base="b", **fields)


def experts(pattern: Any, **task: Any) -> list[str]:
    tasks = {name: {"data": Npz("x.npz"), **task} for name in ("a", "b-c")}
    return [each.expert for each in Suite(name="s", family="clip", base="b", tasks=tasks, experts=pattern).members]


def test_experts_come_from_the_task_a_pattern_or_a_mapping() -> None:
    assert experts("me/clip_{task}") == ["me/clip_a", "me/clip_b-c"]
    assert experts({"a": "x", "b-c": "y"}) == ["x", "y"]
    assert experts("me/clip_{task}", expert="own") == ["own", "own"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (None, "task a has no expert; set suite.tasks.a.expert, or suite.experts to a pattern with {task}"),
        ({"a": "x"}, "task b-c has no expert; set suite.tasks.b-c.expert"),
        ("me/clip", "suite.experts must have one {task} for the task's name, got 'me/clip'"),
        ({"z": "x"}, "suite.experts has no option 'z', the options are a, b-c"),
    ],
)
def test_missing_experts_are_named(pattern: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        experts(pattern)


def test_suites_without_tasks_or_with_half_a_task_are_refused() -> None:
    with pytest.raises(ConfigError, match="suite.tasks must name at least one task"):
        Suite(name="s", family="clip", base="b", tasks={})
    with pytest.raises(ConfigError, match="suite.tasks.t needs data, but only expert is set"):
        Suite(name="s", family="clip", base="b", tasks={"t": {"expert": "e"}})


def test_each_and_tasks_override_processor_and_heads_of_the_suite() -> None:
    entry = {"expert": "e", "data": Npz("x.npz")}
    tasks = {"a": entry, "b": {**entry, "processor": "same", "heads": None}}
    made = Suite(name="s", family="clip", base="b", tasks=tasks, processor="base", heads="expert").members
    assert [(task.processor, task.heads) for task in made] == [("base", "expert"), ("same", "expert")]
    made = Suite(name="s", family="clip", base="b", tasks=tasks, each={"processor": "base"}).members
    assert [(task.processor, task.heads) for task in made] == [("base", "base"), ("same", "base")]
    with pytest.raises(ConfigError, match="suite.processor must be one of expert, base, same, got 'own'"):
        Suite(name="s", family="clip", base="b", tasks=tasks, processor="own")
    with pytest.raises(ConfigError, match="suite.tasks.t.heads must be one of base, expert, got 'own'"):
        suite(heads="own")


def test_tasks_override_their_common_fields() -> None:
    each = {"max_length": 7, "data": Table("a.tsv", "b.tsv", text="body")}
    tasks = {"x": {}, "y": {"max_length": 9, "data": {"text": ["one", "two"]}}}
    made = Suite(name="s", family="bert", base="b", experts="e/{task}", each=each, tasks=tasks).members
    assert [(task.expert, task.max_length) for task in made] == [("e/x", 7), ("e/y", 9)]
    assert made[0].data == each["data"]
    assert made[1].data == Table("a.tsv", "b.tsv", text=["one", "two"])


def test_the_tasks_default_to_the_names_of_the_experts() -> None:
    each = {"data": Npz("x.npz")}
    made = Suite(name="s", family="clip", base="b", experts={"z": "o/z", "a": "o/a"}, each=each, tasks={}).members
    assert [(task.name, task.expert) for task in made] == [("z", "o/z"), ("a", "o/a")]


def test_a_wrong_field_of_a_tasks_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="suite.tasks.t.data has no option 'txt', the options are train, test, text"):
        Suite(
            name="s", family="bert", base="b", experts={"t": "e"}, each={"data": Table("a.tsv", "b.tsv")},
            tasks={"t": {"data": {"txt": "x"}}},
        )  # fmt: skip
