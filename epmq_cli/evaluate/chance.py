"""Whether an expert does its own task better than chance. One that does not was fed wrongly, or is no expert of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from epmq_cli.evaluate.metrics import PERPLEXITY
from epmq_cli.evaluate.score import ScoredTask, Scores

log = logging.getLogger("epmq")

ERRORS = 2.0  # standard errors that a score may be above chance by luck
WORSE = 2.0  # times the base's perplexity
CAUSES = {
    "images": "the order of the labels, the image processor",
    "texts": "the order of the labels, the tokenizer, the columns of the text",
    PERPLEXITY: "the tokenizer, the text, the base that the expert was trained from",
}


@dataclass(frozen=True)
class Check:
    """An expert's score beside the one that chance gives on the same samples.

    `at_chance`: whether it is at most that, up to luck; of perplexities, whether it is as bad as a uniform
    guess among all tokens, or more than `WORSE` times that of the base.
    """

    score: float
    chance: float
    at_chance: bool


def check_experts(tasks: Sequence[ScoredTask], scores: Scores, model: nn.Module) -> dict[str, Check]:
    """A check of each expert that was scored, with a warning for each that is at chance. `model`: the base."""
    experts, base, checks = scores.get("experts", {}), scores.get("base", {}), {}
    for task in tasks:
        if task.name in experts:
            found = check(task, experts[task.name], base.get(task.name), vocabulary(model))
            checks[task.name] = found
            if found.at_chance:
                log.warning("%s", warning(task, found, base.get(task.name)))
    return checks


def vocabulary(model: nn.Module) -> int:
    """How many tokens a model knows; 1 where it reads none."""
    config: Any = model.config
    return int(getattr(config.get_text_config(), "vocab_size", 1))


def check(task: ScoredTask, score: float, base: float | None, tokens: int) -> Check:
    """One expert's score beside chance."""
    if task.metric == PERPLEXITY:
        chance = float(tokens)
        return Check(score, chance, score >= chance or (base is not None and score > WORSE * base))
    chance, error = expected(task)
    return Check(score, chance, score <= chance + ERRORS * error)


def expected(task: ScoredTask) -> tuple[float, float]:
    """What guessing scores on a task's samples, and its standard error: for accuracy the share of the largest class, or
    of one among all classes; for correlations 0."""
    count, labels = len(task.samples), task.samples.labels
    if task.metric != "accuracy" or labels is None:
        return 0.0, 1 / math.sqrt(count)
    classes = len(task.head["weight"]) if "weight" in task.head else task.classes
    largest = int(torch.bincount(labels).max()) / count
    chance = max(largest, 1 / classes if classes else 0.0)
    return chance, math.sqrt(chance * (1 - chance) / count)


def warning(task: ScoredTask, found: Check, base: float | None) -> str:
    """What the user should know of an expert that is at chance."""
    if task.metric == PERPLEXITY:
        beside = f"the base's is {base:.4g}" if base is not None else ""
        beside = f"a uniform guess has {found.chance:.4g}" if found.score >= found.chance else beside
        return (
            f"task {task.name}: the expert's perplexity is {found.score:.4g}, and {beside}; check {CAUSES[PERPLEXITY]}"
        )
    kind = "texts" if isinstance(task.samples.inputs[0], (str, tuple)) else "images"
    return (
        f"task {task.name}: the expert scores {100 * found.score:.1f} ({task.metric} in %) on {len(task.samples)} test "
        f"samples, where chance is {100 * found.chance:.1f}; check {CAUSES[kind]}, and that the expert is one of this "
        "task"
    )
