"""Oracle: the scores of guessing, by hand."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epmq_cli.data.samples import Samples
from epmq_cli.evaluate.chance import check, check_experts, warning
from epmq_cli.evaluate.metrics import Score
from epmq_cli.evaluate.score import ScoredTask


def scored(labels: list[Any], metric: str = "accuracy", classes: int = 2) -> ScoredTask:
    samples = Samples(["a text"] * len(labels), torch.tensor(labels))
    outputs = 1 if metric == "spearman" else classes
    return ScoredTask("films", samples, dict, {"weight": torch.zeros(outputs, 3)}, lambda *_: None, metric)


@pytest.mark.parametrize(
    ("task", "score", "chance", "at_chance"),
    [
        (scored([0, 1] * 200), 0.0, 0.5, True),
        (scored([0, 1] * 200), 0.54, 0.5, True),
        (scored([0, 1] * 200), 0.6, 0.5, False),
        (scored([0] * 90 + [1] * 10), 0.9, 0.9, True),
        (scored([0] * 90 + [1] * 10), 0.97, 0.9, False),
        (scored([0, 1, 2, 3] * 100, classes=4), 0.25, 0.25, True),
        (scored([0, 1] * 200, "matthews"), -0.9, 0.0, True),
        (scored([0, 1] * 200, "matthews"), 0.3, 0.0, False),
        (scored([0.5, 1.5] * 200, "spearman"), 0.05, 0.0, True),
        (scored([0.5, 1.5] * 200, "spearman"), 0.8, 0.0, False),
    ],
)
def test_chance_levels(task: ScoredTask, score: float, chance: float, at_chance: bool) -> None:
    found = check(task, score, None, 1)
    assert (found.chance, found.at_chance) == (chance, at_chance)


@pytest.mark.parametrize(("score", "base", "at_chance"), [(900, None, True), (90, 40, True), (70, 40, False)])
def test_perplexities_are_compared_with_a_uniform_guess_and_the_base(score: float, base: Any, at_chance: bool) -> None:
    """Closed form: a uniform guess among 500 tokens has a perplexity of 500."""
    task = ScoredTask("code", Samples([torch.arange(9)]), dict, {}, lambda *_: None, "perplexity", 4)
    found = check(task, score, base, 500)
    assert (found.chance, found.at_chance) == (500, at_chance)


@pytest.mark.parametrize(("marked", "said"), [(False, True), (True, False)])
def test_bad_perplexities_of_conversations_may_be_of_questions(marked: bool, said: bool) -> None:
    ids = torch.ones(9, 2).long() if marked else torch.arange(9)
    task = ScoredTask("code", Samples([ids]), dict, {}, lambda *_: None, "perplexity", 4, talks=True, text=ids)
    text = warning(task, check(task, 90, 40, 500), 40)
    assert ("set suite.tasks.code.assistant_only_loss=true if it was trained on answers only" in text) == said


def test_an_expert_at_chance_causes_a_warning_that_names_it(caplog: pytest.LogCaptureFixture) -> None:
    """One warning for the expert at chance, none for the good one."""
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    tasks = [scored([0, 1] * 50)]
    with caplog.at_level(logging.WARNING, "epmq"):
        assert not check_experts(tasks, {"experts": {"films": Score(0.95)}}, model)["films"].at_chance
        assert not caplog.text
        assert check_experts(tasks, {"experts": {"films": Score(0.05)}}, model)["films"].at_chance
    assert "task films: the expert scores 5.0 (accuracy in %) on 100 test samples, where chance is 50.0" in caplog.text
    assert check_experts(tasks, {}, model) == {}
