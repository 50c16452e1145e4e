"""Oracle: closed forms on vectors chosen by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from epmq_cli.config.schema import Evaluation
from epmq_cli.data.images import Npz
from epmq_cli.data.samples import Samples
from epmq_cli.data.suite import Task
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.evaluate.metrics import MEASURES
from epmq_cli.evaluate.score import ScoredTask, Scorer
from epmq_cli.families.bert import BERT
from epmq_cli.families.clip import CLIP
from epmq_cli.families.family import Family
from epmq_cli.families.heads import classifier, zero_shot


def test_class_embeddings_average_normalised_templates() -> None:
    table = {"a x": [3.0, 0.0], "b x": [0.0, 0.5], "a y": [0.0, 2.0], "b y": [0.0, 9.0]}
    found = zero_shot.class_embeddings(
        lambda texts: torch.tensor([table[t] for t in texts]), ["x", "y"], ["a {}", "b {}"]
    )
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_zero_shot_logits_are_a_hundred_cosines() -> None:
    found = zero_shot.logits(torch.tensor([[0.0, 7.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 100.0, -100.0]]))


def test_classifier_logits_are_those_of_a_linear() -> None:
    linear = nn.Linear(4, 3)
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head = {"weight": linear.weight, "bias": linear.bias}
        torch.testing.assert_close(classifier.logits(features, head), linear(features))
        torch.testing.assert_close(classifier.logits(features, {"weight": linear.weight}), features @ linear.weight.T)


def reading_inputs(family: Family) -> Family:
    """The family, with the inputs of a model as its features."""
    found = Family(family.architecture, family.tasks)
    found.features = lambda model, batch: batch["x"]  # type: ignore[method-assign, misc]
    return found


def scorer(family: Family, batch_size: int) -> Scorer:
    evaluation = Evaluation(batch_size, None, (), "dequantize", True)
    return Scorer(evaluation, reading_inputs(family), torch.device("cpu"))


def scored(inputs: list[Any], labels: list[int]) -> ScoredTask:
    samples = Samples(inputs, torch.tensor(labels, dtype=torch.int64))
    predict = reading_inputs(CLIP).predict(Path(), Task("t", "expert", Npz("t.npz")))
    return ScoredTask("t", samples, lambda items: {"x": torch.tensor(items)}, {"weight": torch.eye(3)}, predict)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_accuracy_is_the_correct_fraction_for_any_batch_size(batch_size: int) -> None:
    directions = normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0.1, 0], [0, 0.9, 1]])).tolist()
    task = scored(directions, [0, 1, 0, 0, 2])
    assert scorer(CLIP, batch_size).score(nn.Identity(), task) == (0.8, pytest.approx(math.sqrt(0.8 * 0.2 / 5)), 5)


@pytest.mark.parametrize("label", [3, -2])
def test_labels_outside_the_head_are_refused(label: int) -> None:
    with pytest.raises(DataError, match=r"task t: labels must lie in 0..2 as its head has 3 classes"):
        scored([[1.0, 0, 0]], [label])


def test_a_task_without_test_samples_is_refused() -> None:
    with pytest.raises(DataError, match="task t has no test samples"):
        scored([], [])


def test_a_head_with_one_output_predicts_a_number() -> None:
    """The ranks of 2 x equal those of x."""
    labels = torch.tensor([0.5, 3.0, 1.0, 2.0])
    task = Task("t", "expert", Npz("t.npz"), metric="spearman")
    head = {"weight": torch.tensor([[2.0]])}
    predict = reading_inputs(BERT).predict(Path(), task)
    scored = ScoredTask("t", Samples(labels[:, None].tolist(), labels), collate, head, predict, "spearman")
    assert scorer(BERT, 3).score(nn.Identity(), scored) == (pytest.approx(1), pytest.approx(0, abs=1e-6), 4)


def collate(items: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.tensor(items)}


@pytest.mark.parametrize(
    ("metric", "predictions", "labels", "wanted"),
    [
        ("accuracy", [0, 1, 1, -1], [0, 1, 0, 0], 0.5),
        ("matthews", [0, 1, 1, 0], [0, 1, 1, 0], 1.0),
        ("matthews", [1, 0, 0, 1], [0, 1, 1, 0], -1.0),
        ("spearman", [1.0, 2.0, 4.0], [0.0, 5.0, 5.5], 1.0),
        ("spearman", [1.0, 1.0, 1.0], [0.0, 5.0, 5.5], 0.0),
    ],
)
def test_metrics(metric: str, predictions: list[float], labels: list[float], wanted: float) -> None:
    assert MEASURES[metric](torch.tensor(predictions), torch.tensor(labels)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("metric", "labels", "message"),
    [
        (
            "spearman",
            [-1.0, -1.0],
            "no labels, all are -1, .* give a split or a file with labels in suite.tasks.t.data",
        ),
        ("accuracy", [-1, -1], "no labels, all are -1"),
        ("spearman", [2.5, 2.5], "spearman needs labels that differ, and those of all 2 test samples are 2.5"),
        ("matthews", [1, 1], "matthews needs labels that differ, and those of all 2 test samples are 1"),
    ],
)
def test_labels_without_a_defined_metric_are_refused(metric: str, labels: list[float], message: str) -> None:
    """The unlabelled test split of STS-B, and correlations with a constant, which are undefined."""
    head = {"weight": torch.ones(3 if isinstance(labels[0], int) else 1, 1)}
    task = Task("t", "expert", Npz("t.npz"), metric=metric)
    predict = reading_inputs(CLIP).predict(Path(), task)
    with pytest.raises(DataError, match=message):
        ScoredTask("t", Samples([[1.0]] * 2, torch.tensor(labels)), lambda items: {}, head, predict, metric)


def test_perplexity_needs_two_tokens_in_a_sequence() -> None:
    with pytest.raises(ConfigError, match=r"suite.tasks.t.max_length must be a whole number in \[2, .*got 1"):
        Task("t", "expert", Npz("t.npz"), metric="perplexity", max_length=1)
