"""Accuracy of a model on the tasks of a suite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from epmq_cli.calibrate.draw import batches
from epmq_cli.console import bar
from epmq_cli.data.samples import Samples
from epmq_cli.errors import DataError
from epmq_cli.families.family import Collate, Family, Head
from epmq_cli.report.metrics import Scores


@dataclass(frozen=True)
class ScoredTask:
    """A task ready to be scored: its test samples, how they become batches, and its head on the device."""

    name: str
    samples: Samples
    collate: Collate
    head: Head

    def __post_init__(self) -> None:
        if len(self.samples) == 0:
            raise DataError(f"task {self.name} has no test samples to score on")
        classes = len(self.head["weight"])
        highest, lowest = int(self.samples.labels.max()), int(self.samples.labels.min())
        if highest >= classes or lowest < 0:
            raise DataError(
                f"task {self.name}: labels must lie in 0..{classes - 1} as its head has {classes} classes, "
                f"got {lowest}..{highest}"
            )


def accuracy(
    family: Family,
    model: nn.Module,
    task: ScoredTask,
    batch_size: int,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> float:
    """The fraction of the task's samples whose largest logit is at the label; `advance` is called after each batch."""
    samples, right, start = task.samples.by_length(), 0, 0
    with torch.inference_mode():
        for batch in batches(samples, task.collate, batch_size, device):
            guessed = family.logits(family.features(model, batch), task.head).argmax(-1).cpu()
            right += int((guessed == samples.labels[start : start + len(guessed)]).sum())
            start += len(guessed)
            advance()
    return right / len(samples)


def accuracies(
    family: Family,
    model: nn.Module,
    tasks: Sequence[ScoredTask],
    batch_size: int,
    device: torch.device,
    stage: str,
    before: Callable[[ScoredTask], None] = lambda task: None,
) -> Scores:
    """Accuracy by task name, under the stage's name; `before` is called before each task."""
    scores = {}
    with bar(f"score {stage}", sum(math.ceil(len(task.samples) / batch_size) for task in tasks)) as advance:
        for task in tasks:
            before(task)
            scores[task.name] = accuracy(family, model, task, batch_size, device, advance)
    return {stage: scores}
