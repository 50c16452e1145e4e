"""Chooses lam, alpha, beta and rho without labels. Unquantized walks calibrate on four fifths of the samples; the
divergence of the outputs from the experts' is measured on the last fifth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from epmq_cli.calibrate.guidance import AUTO, Guidance

GRID: dict[str, tuple[float, ...]] = {
    "lam": (0.001, 0.1, 0.03, 0.01, 0.003, 0.0003, 0.0001),
    "beta": (1.0, 0.5, 0.0),
    "alpha": (1.0, 0.7, 0.3),
    "rho": (1.0, 2.0, 3.0),
}
"""The values to try, in this order of options. An option has its first value until its turn."""


@dataclass(frozen=True)
class Choice:
    """The chosen guidance, and the trials: the values of the options and the `divergence`."""

    guidance: Guidance
    trials: list[dict[str, float]]


def choose(guidance: Guidance, divergence: Callable[[Guidance], float]) -> Choice:
    """Chooses the `auto` options one after the other, each with its lowest divergence; ties go to the first value."""
    names = [name for name in GRID if getattr(guidance, name) == AUTO]
    best = _with(guidance, {name: GRID[name][0] for name in names})
    trials: list[dict[str, float]] = []

    def attempt(candidate: Guidance) -> float:
        values: dict[str, Any] = {name: getattr(candidate, name) for name in names}
        for trial in trials:
            if all(trial[name] == value for name, value in values.items()):
                return trial["divergence"]
        trials.append({**values, "divergence": divergence(candidate)})
        return trials[-1]["divergence"]

    for name in names:
        candidates = [_with(best, {name: value}) for value in GRID[name]]
        best = min(candidates, key=attempt)
    return Choice(best, trials)


def _with(guidance: Guidance, values: Mapping[str, Any]) -> Guidance:
    return replace(guidance, **values)
