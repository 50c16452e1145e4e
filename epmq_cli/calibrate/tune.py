"""Choosing lam, alpha, beta and rho without labels: walks without quantizer on four fifths of the calibration samples,
and the error of the logits on the last fifth against the experts' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from epmq_cli.calibrate.guidance import AUTO, Guidance
from epmq_cli.data.batching import Batch, size
from epmq_cli.errors import DataError

HOLD = 5  # one sample in so many is held out
GRID: dict[str, tuple[float, ...]] = {
    "lam": (0.001, 0.1, 0.03, 0.01, 0.003, 0.0003, 0.0001),
    "beta": (1.0, 0.5, 0.0),
    "alpha": (1.0, 0.7, 0.3),
    "rho": (1.0, 2.0, 3.0),
}
"""What is tried, in this order of options; the first value of each stands in until its turn."""


@dataclass(frozen=True)
class Choice:
    """The guidance that was chosen, and each trial: the values tried and the `error`."""

    guidance: Guidance
    trials: list[dict[str, float]]


def choose(guidance: Guidance, error: Callable[[Guidance], float]) -> Choice:
    """The options that are `auto`, settled one after the other, each at its least error; of equals the first."""
    names = [name for name in GRID if getattr(guidance, name) == AUTO]
    settled = _with(guidance, {name: GRID[name][0] for name in names})
    trials: list[dict[str, float]] = []

    def attempt(candidate: Guidance) -> float:
        values: dict[str, Any] = {name: getattr(candidate, name) for name in names}
        for trial in trials:
            if all(trial[name] == value for name, value in values.items()):
                return trial["error"]
        trials.append({**values, "error": error(candidate)})
        return trials[-1]["error"]

    for name in names:
        candidates = [_with(settled, {name: value}) for value in GRID[name]]
        settled = min(candidates, key=attempt)
    return Choice(settled, trials)


def _with(guidance: Guidance, values: Mapping[str, Any]) -> Guidance:
    return replace(guidance, **values)


def holdout_split(batches: Mapping[str, Sequence[Batch]]) -> tuple[dict[str, list[Batch]], dict[str, list[Batch]]]:
    """Each task's batches without every fifth sample, and those samples; DataError where there are too few."""
    parts = ({}, {})  # type: tuple[dict[str, list[Batch]], dict[str, list[Batch]]]
    for task, group in batches.items():
        count = sum(map(size, group))
        if count < 2 * HOLD:
            raise DataError(
                f"task {task} has {count} calibration samples, of which auto holds out one in {HOLD} and needs two: "
                f"raise calib.samples to {2 * HOLD} or more, or give lam, alpha, beta and rho as numbers"
            )
        fitted, held = zip(*_divided(group), strict=True)
        parts[0][task], parts[1][task] = [b for b in fitted if size(b)], [b for b in held if size(b)]
    return parts


def _divided(batches: Sequence[Batch]) -> Iterator[tuple[Batch, Batch]]:
    seen = 0
    for batch in batches:
        numbers = torch.arange(seen, seen + size(batch))
        held = numbers % HOLD == HOLD - 1
        seen += len(numbers)
        yield {name: x[~held] for name, x in batch.items()}, {name: x[held] for name, x in batch.items()}
