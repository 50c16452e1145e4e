"""Oracle: class orders written by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epmq_cli.data.images import ImageFolder
from epmq_cli.data.samples import Samples
from epmq_cli.data.suite import Task
from epmq_cli.data.table import Table
from epmq_cli.errors import DataError, ModelError
from epmq_cli.evaluate.class_names import Heading, fold, in_order_of_head, match, translated
from epmq_cli.families.heads.classifier import check_single_label, read_names

POSITIONS = None


def own(*names: str, count: int | None = None) -> Heading:
    return Heading("t", names or None, count or len(names), own=True)


def prompts(*names: str) -> Heading:
    return Heading("t", names, None, own=False)


@pytest.mark.parametrize(
    ("heading", "data", "order", "said"),
    [
        (own("NEGATIVE", "POSITIVE"), ("negative", "positive"), POSITIONS, None),
        (own("POSITIVE", "NEGATIVE"), (" negative", "Positive "), (1, 0), "classes are matched by name"),
        (own("not_entailment", "entailment"), ("entailment", "not-entailment"), (1, 0), "matched by name"),
        (own("contradiction", "entailment", "neutral"), ("entailment", "neutral", "contradiction"), (1, 2, 0), "name"),
        (own("neg", "pos"), None, POSITIONS, "labels 0 to 1 are taken as neg, pos"),
        (own("POSITIVE", "NEGATIVE"), ("neg", "pos"), (1, 0), "matched by name"),
        (own("NEGATIVE", "POSITIVE"), ("neg", "pos"), POSITIONS, None),
        (own("1", "0"), None, (1, 0), "matched by name"),
        (own("LABEL_1", "LABEL_0"), None, (1, 0), "matched by name"),
        (own(count=2), None, POSITIONS, None),
        (own(count=2), ("neg", "pos"), POSITIONS, "could not be compared"),
        (own(count=2), ("LABEL_1", "LABEL_0"), (1, 0), "matched by name"),
        (own(count=2), ("1", "2"), POSITIONS, "could not be compared"),
        (own("1 star", "2 stars", "3 stars"), ("1", "2", "3"), POSITIONS, None),
        (own("3 stars", "2 stars", "1 star"), ("1", "2", "3"), (2, 1, 0), "matched by name"),
        (own("neg", "pos"), ("0", "1"), POSITIONS, "labels are matched by position, 0, 1 as neg, pos"),
        (own("0", "1"), ("neg", "pos"), POSITIONS, "the classes of the head are numbers"),
        (own("entailment", "neutral", "contradiction"), ("entailment", "contradiction"), (0, 2), "matched by name"),
        (own("a", "b", "c"), ("a", "b"), POSITIONS, "the head also has c"),
        (own("A", "a"), ("a", "A"), (1, 0), "matched by name"),
        (prompts("square", "circle", "cross"), ("circle", "cross", "square"), (1, 2, 0), "matched by name"),
        (prompts("tench", "shark"), ("n01440764", "n01484850"), POSITIONS, "which share no name"),
        (prompts("no", "yes"), ("not_equivalent", "equivalent"), POSITIONS, "which share no name"),
        (
            prompts("crop land", "forest", "river"),
            ("AnnualCrop", "Forest", "River"),
            POSITIONS,
            "AnnualCrop as crop land",
        ),
        (prompts("T - shirt / top", "Bag"), ("T-shirt/top", "Bag"), POSITIONS, None),
        (
            prompts(*"abcdefghijkl", "crane", "sunglasses", "lens"),
            (*"abcdefghijkl", "crane", "sunglass", "sunglasses"),
            POSITIONS,
            "labels are matched by position, sunglass as sunglasses, sunglasses as lens; the other names are the same",
        ),
        (prompts("a", "b"), ("b", "a", "unused"), (1, 0, None), "matched by name"),
        (prompts("zero", "one"), ("0", "1"), POSITIONS, "the labels of the data are numbers"),
        (prompts("A", "B"), tuple(map(str, range(37))), POSITIONS, "the labels of the data are numbers"),
    ],
)
def test_match_kinds(heading: Heading, data: Any, order: Any, said: str | None) -> None:
    found = match(heading, data)
    assert found.order == order
    assert (said is None) == (found.message is None)
    assert said is None or said in str(found.message)


@pytest.mark.parametrize(
    ("heading", "data", "message"),
    [
        (
            own("not_equivalent", "equivalent"),
            ("no", "yes"),
            "has the classes not_equivalent, equivalent and the data no",
        ),
        (own("a", "b", "c"), ("a", "b", "d"), "only 2 of the names are in both"),
        (own("negative", "neglected"), ("neg", "other"), "no name is in both"),
        (own("entailment", "other"), ("entailment", "entailed"), "only 1 of the names are in both"),
        (own("a", "b"), ("a", "b", "c"), "match_labels: position"),
        (own(count=3), ("neg", "pos"), "its head has 3 classes and the data 2"),
        (own("neg", "pos"), ("10", "2"), "numbers in another order, 10, 2"),
        (own("same", "same"), ("same", "other", "third"), "its head has 2 classes and the data 3"),
        (prompts("cat", "dog", "bird"), ("dog", "cat", "fish"), "the suite has the classes cat, dog, bird"),
        (prompts("tench", "shark"), ("n01", "n02", "n03"), "no name is in both"),
        (
            prompts("one", "two", "ten"),
            ("1", "10", "2"),
            "list the data's values in the order of the head in data.labels",
        ),
        (
            own(count=4),
            ("0", "1", "10", "2"),
            "its head names no classes; list the data's values in the order of the head",
        ),
        (
            own("LABEL_1", "LABEL_0"),
            ("neg", "pos"),
            "the classes of the head are numbers in another order, LABEL_1, LABEL_0",
        ),
    ],
)
def test_names_that_contradict_are_refused(heading: Heading, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        match(heading, data)


def task(**fields: Any) -> Task:
    return Task("t", "expert", ImageFolder("a", "b"), **fields)


def test_labels_are_translated_into_the_order_of_the_head() -> None:
    """Label 0 of the data is class 1 of the head; a label without a class in the head is named."""
    samples = Samples("abc", torch.tensor([0, 1, 0]), ("neg", "pos"))
    heading = own("POS", "NEG")
    found = translated(samples, in_order_of_head(samples, heading, task()).order, heading)
    assert found.labels.tolist() == [1, 0, 1]
    assert samples.labels.tolist() == [0, 1, 0]
    assert in_order_of_head(samples, heading, task(match_labels="position")).order is None
    with pytest.raises(DataError, match="have the label pos, which is not among the classes POS"):
        translated(samples, (0, None), heading)


def test_classes_of_the_suite_name_the_labels_of_unnamed_data() -> None:
    """As in `epmq eval` if the suite lists the classes in another order than the checkpoint."""
    samples = Samples("ab", torch.tensor([0, 1]))
    assert in_order_of_head(samples, prompts("a", "b"), task(classes=("b", "a"))).order == (1, 0)
    assert in_order_of_head(samples, prompts("a", "b"), task(classes=("a", "b"))).message is None


def expert(**config: Any) -> Any:
    return SimpleNamespace(config=config, role="expert of task t", path=__import__("pathlib").Path("e"))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, None),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, None),
        ({"id2label": {"0": "NEG", "1": "POS"}}, ("NEG", "POS")),
        ({"id2label": {"1": "POS", "0": "NEG"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, ("NEG", "POS")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"POS": "1", "NEG": "0"}}, ("NEG", "POS")),
        ({"id2label": {"0": 1, "1": 0}}, ("1", "0")),
        ({"id2label": {"0": "LABEL_1", "1": "LABEL_0"}}, ("LABEL_1", "LABEL_0")),
        ({"id2label": ["a", "b"]}, None),
    ],
)
def test_class_names_of_a_config(config: dict[str, Any], wanted: Any) -> None:
    assert read_names(expert(**config), 2) == wanted


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}}, "id2label that contradicts its label2id"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "names the classes 0: a, 1: b, 2: c, and its head has 2 rows"),
        ({"id2label": {"1": "a", "2": "b"}}, "its head has 2 rows, 0 to 1"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_names(expert(**config), 2)


def test_multi_label_heads_are_refused_by_name() -> None:
    """The values of problem_type are those of transformers."""
    check_single_label(expert(problem_type="single_label_classification"), "t")
    with pytest.raises(
        ModelError, match="has problem_type multi_label_classification; epmq scores task t by one label"
    ):
        check_single_label(expert(problem_type="multi_label_classification"), "t")


def test_folding_keeps_distinct_names_distinct() -> None:
    """Case, spaces, _ and - are folded; signs of numbers are not."""
    assert fold("Not-Equivalent ") == fold("not_equivalent") == "notequivalent"
    assert fold("-1") != fold("1")
    assert fold("01") == fold("1")


@pytest.mark.parametrize(
    ("names", "labels", "wanted"),
    [
        (("1", "2", "3"), [1, 3, 2], [0, 2, 1]),
        (("LABEL_3", "LABEL_1", "LABEL_2"), [3, 1], [0, 1]),
        (("1", "2", "3"), [0, 2, 1], [0, 2, 1]),  # positions, because there is no class 0
        (("1", "2", "3"), [1, 5], [1, 5]),  # neither; refused when they are scored
        (("1", "2", "3"), [2, 1], None),
        (("2", "4"), [4, 2, 4], [1, 0, 1]),
    ],
)
def test_values_can_be_numeric_class_names_of_the_head(
    names: tuple[str, ...], labels: list[int], wanted: list[int] | None
) -> None:
    """Labels of unnamed data may be names of classes or positions; if they may be both, they are refused."""
    task = Task("t", "expert", Table("a.csv", "a.csv"))
    samples = Samples(list(labels), torch.tensor(labels))
    if wanted is None:
        with pytest.raises(DataError, match=r"the labels 1, 2 may be the classes of these names, or .* in data.labels"):
            in_order_of_head(samples, own(*names), task)
        return
    found = in_order_of_head(samples, own(*names), task)
    translation = translated(samples, found.order, own(*names)).labels
    assert translation is not None
    assert translation.tolist() == wanted


def test_an_explicit_order_of_numbers_is_accepted() -> None:
    """Without it, the sorted folders 0, 1, 10, 2 are refused."""
    found = match(own(count=4), ("0", "1", "10", "2"), listed=True)
    assert found.order is None
