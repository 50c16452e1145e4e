"""Checks whether an expert beats chance on its own task. If not, it reads wrong inputs or was trained for another
task."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from epmq_cli.data.suite import TEXT_METRICS
from epmq_cli.evaluate.metrics import PERPLEXITY
from epmq_cli.evaluate.score import ScoredTask, Scores

log = logging.getLogger("epmq")

ERRORS = 2.0  # standard errors above chance that count as luck
WORSE = 2.0  # times the perplexity of the base
CAUSES = {
    "images": "the order of the labels, the image processor",
    "texts": "the order of the labels, the tokenizer, the columns of the text",
    PERPLEXITY: "the tokenizer, the text, the base that the expert was trained from",
}


@dataclass(frozen=True)
class Check:
    """An expert's score, and the expected score of guessing on the same samples.

    `at_chance`: whether the score is not significantly above chance; for perplexity, whether it is no better than a
    uniform guess among all tokens, or more than `WORSE` times the base's; for written texts, whether it is no better
    than that of empty ones.
    """

    score: float
    chance: float
    at_chance: bool


def check_experts(tasks: Sequence[ScoredTask], scores: Scores, model: nn.Module) -> dict[str, Check]:
    """Checks each expert that was scored, and warns about those at chance. `model`: the base."""
    experts, base, checks = scores.get("experts", {}), scores.get("base", {}), {}
    for task in tasks:
        if task.name in experts:
            other = base[task.name].value if task.name in base else None
            result = check(task, experts[task.name].value, other, vocabulary(model))
            checks[task.name] = result
            if result.at_chance:
                log.warning("%s", warning(task, result, other))
    return checks


def vocabulary(model: nn.Module) -> int:
    """The size of a model's vocabulary; 1 if it reads no text."""
    config: Any = model.config
    return int(getattr(config.get_text_config(), "vocab_size", 1))


def check(task: ScoredTask, score: float, base: float | None, tokens: int) -> Check:
    """Compares the score of an expert with chance."""
    if task.metric == PERPLEXITY:
        chance = float(tokens)
        return Check(score, chance, score >= chance or (base is not None and score > WORSE * base))
    if task.metric in TEXT_METRICS:
        return Check(score, 1.0, score >= 1) if task.metric == "wer" else Check(score, 0.0, score <= 0)
    chance, error = expected(task)
    return Check(score, chance, score <= chance + ERRORS * error)


def expected(task: ScoredTask) -> tuple[float, float]:
    """The expected score of guessing on a task's samples, and its standard error. For accuracy, this is the share of
    the largest class or one over the number of classes, whichever is larger; for correlations, it is 0; for rankings
    the share of the documents that the metric looks at."""
    count, labels = len(task.samples), task.samples.labels
    if task.ranking is not None:  # the first of the documents in any order
        count, found = len(task.ranking.queries), int(task.metric.partition("@")[2])
        chance = min(1.0, found / len(task.ranking.documents))
        return chance, math.sqrt(chance * (1 - chance) / count)
    if task.metric != "accuracy" or labels is None:
        return 0.0, 1 / math.sqrt(count)
    classes = len(task.head["weight"]) if "weight" in task.head else task.classes
    largest = int(torch.bincount(labels).max()) / count
    chance = max(largest, 1 / classes if classes else 0.0)
    return chance, math.sqrt(chance * (1 - chance) / count)


def warning(task: ScoredTask, result: Check, base: float | None) -> str:
    """The warning of an expert at chance."""
    if task.metric == PERPLEXITY:
        other = f"the base's is {base:.4g}" if base is not None else ""
        other = f"a uniform guess has {result.chance:.4g}" if result.score >= result.chance else other
        trained = task.talks and task.text is not None and task.text.ndim == 1
        answers = f"suite.tasks.{task.name}.assistant_only_loss=true if it was trained on answers only, or check "
        return (
            f"task {task.name}: the expert's perplexity is {result.score:.4g}, and {other}; "
            f"{'set ' + answers if trained else 'check '}{CAUSES[PERPLEXITY]}"
        )
    if task.metric in TEXT_METRICS:
        return (
            f"task {task.name}: the expert scores {100 * result.score:.1f} ({task.metric} in %) on {len(task.samples)} "
            f"test samples, no better than with empty answers; check the tokenizer, the columns of the text, and "
            f"suite.tasks.{task.name}.answer_length"
        )
    kind = "texts" if isinstance(task.samples.inputs[0], (str, tuple)) else "images"
    return (
        f"task {task.name}: the expert scores {100 * result.score:.1f} ({task.metric} in %) on {len(task.samples)} "
        f"test samples, where chance is {100 * result.chance:.1f}; check {CAUSES[kind]}, and that the expert was "
        "trained for this task"
    )
