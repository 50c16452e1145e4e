"""Oracle: the samples of the sources themselves."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from epmq_cli.data.mixture import Mixture
from epmq_cli.data.samples import Samples, Split, raw
from epmq_cli.data.sampling import draw, parts_of
from epmq_cli.data.suite import Task
from epmq_cli.errors import ConfigError, DataError


class Texts:
    """`size` texts that begin with a letter, with labels if `classes` are given."""

    def __init__(self, letter: str, size: int, classes: tuple[str, ...] | None = None) -> None:
        self.letter, self.size, self.classes = letter, size, classes

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        texts = [f"{self.letter} {split} {number}" for number in range(self.size)]
        labels = torch.zeros(self.size, dtype=torch.int64) if self.classes else None
        return Samples(texts, labels, self.classes).some(count, seed)


def letters(samples: Samples) -> Counter[str]:
    return Counter(text[0] for text in samples.inputs)


def test_samples_are_shared_out_by_weight() -> None:
    data = Mixture([Texts("a", 50), Texts("b", 50)], [3, 1])
    task = Task(name="t", expert="e", data=data)
    drawn = draw(task, 20, 0)
    assert letters(drawn) == {"a": 15, "b": 5}
    assert letters(Samples([drawn.inputs[i] for i in range(10)])) != {"a": 10}  # in random order
    assert list(drawn.inputs) == list(draw(task, 20, 0).inputs) != list(draw(task, 20, 1).inputs)
    assert [share for _, share in parts_of(data, 3)] == [2, 1]
    assert sum(share or 0 for share in Mixture([Texts(letter, 5) for letter in "abc"]).shares(10)) == 10
    assert [share for _, share in parts_of(Mixture([Texts("a", 5), Texts("b", 5)], [99, 1]), 4)] == [4]


def test_the_test_split_has_all_sources() -> None:
    samples = Mixture([Texts("a", 2, ("x", "y")), Texts("b", 3, ("x", "y"))], [9, 1]).load("test")
    assert list(samples.inputs) == ["a test 0", "a test 1", "b test 0", "b test 1", "b test 2"]
    assert samples.labels is not None
    assert samples.labels.tolist() == [0] * 5
    assert [raw(samples.inputs, place) for place in (1, 4)] == ["a test 1", "b test 2"]
    assert Mixture([Texts("a", 2, ("x", "y")), Texts("b", 3, ("x", "y"))]).load("test", 4).labels is not None


def test_wrong_mixtures_are_refused() -> None:
    with pytest.raises(ConfigError, match="data.sources must be two or more sources, each with a _target_"):
        Mixture([Texts("a", 1)])
    with pytest.raises(ConfigError, match=r"data.weights must have one number for each of the 2 sources, got \[1\]"):
        Mixture([Texts("a", 1), Texts("b", 1)], [1])
    with pytest.raises(ConfigError, match="data.weights"):
        Mixture([Texts("a", 1), Texts("b", 1)], [1, 0])
    with pytest.raises(DataError, match="name their classes differently"):
        Mixture([Texts("a", 1, ("x", "y")), Texts("b", 1, ("y", "x"))]).load("test")
