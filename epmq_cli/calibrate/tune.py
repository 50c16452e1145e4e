"""Chooses lam, alpha, beta and rho without labels. Unquantized walks calibrate on four fifths of the samples; the error
of the logits against the experts' is measured on the last fifth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from epmq_cli.calibrate.guidance import AUTO, Guidance
from epmq_cli.data.batching import Batch, size
from epmq_cli.data.held_out import HOLD
from epmq_cli.errors import DataError

GRID: dict[str, tuple[float, ...]] = {
    "lam": (0.001, 0.1, 0.03, 0.01, 0.003, 0.0003, 0.0001),
    "beta": (1.0, 0.5, 0.0),
    "alpha": (1.0, 0.7, 0.3),
    "rho": (1.0, 2.0, 3.0),
}
"""The values to try, in this order of options. An option has its first value until its turn."""


@dataclass(frozen=True)
class Choice:
    """The chosen guidance, and the trials: the values of the options and the `error`."""

    guidance: Guidance
    trials: list[dict[str, float]]


def choose(guidance: Guidance, error: Callable[[Guidance], float]) -> Choice:
    """Chooses the `auto` options one after the other, each with its lowest error; ties go to the first value."""
    names = [name for name in GRID if getattr(guidance, name) == AUTO]
    best = _with(guidance, {name: GRID[name][0] for name in names})
    trials: list[dict[str, float]] = []

    def attempt(candidate: Guidance) -> float:
        values: dict[str, Any] = {name: getattr(candidate, name) for name in names}
        for trial in trials:
            if all(trial[name] == value for name, value in values.items()):
                return trial["error"]
        trials.append({**values, "error": error(candidate)})
        return trials[-1]["error"]

    for name in names:
        candidates = [_with(best, {name: value}) for value in GRID[name]]
        best = min(candidates, key=attempt)
    return Choice(best, trials)


def _with(guidance: Guidance, values: Mapping[str, Any]) -> Guidance:
    return replace(guidance, **values)


def holdout_split(batches: Mapping[str, Sequence[Batch]]) -> tuple[dict[str, list[Batch]], dict[str, list[Batch]]]:
    """Holds out every fifth sample of each task. Raises DataError if a task has too few samples."""
    parts = ({}, {})  # type: tuple[dict[str, list[Batch]], dict[str, list[Batch]]]
    for task, group in batches.items():
        count = sum(map(size, group))
        if count < 2 * HOLD:
            raise DataError(
                f"task {task} has {count} calibration samples, but auto options need {2 * HOLD}, because one in {HOLD} "
                f"is held out; raise calib.samples, or set lam, alpha, beta and rho to numbers"
            )
        fitted, held = zip(*_split_batches(group), strict=True)
        parts[0][task], parts[1][task] = [b for b in fitted if size(b)], [b for b in held if size(b)]
    return parts


def _split_batches(batches: Sequence[Batch]) -> Iterator[tuple[Batch, Batch]]:
    seen = 0
    for batch in batches:
        numbers = torch.arange(seen, seen + size(batch))
        held = numbers % HOLD == HOLD - 1
        seen += len(numbers)
        yield {name: x[~held] for name, x in batch.items()}, {name: x[held] for name, x in batch.items()}
