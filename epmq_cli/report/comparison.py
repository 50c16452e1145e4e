"""The table of several runs: a row a run, with the overrides that differ, scores, size and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epmq_cli.report import numbers
from epmq_cli.report.run_folders import Run, overrides_of
from epmq_cli.report.settings import value_at

ASIDE = ("out", "device", "cache", "resume")
"""Options that do not tell runs apart."""
NAMED = "run"
NEAR = "\u2248"
LEGEND = (
    f"{NEAR} within the noise of the best average, sqrt(se1^2 + se2^2) as of independent samples; a paired test on the "
    "shared samples would be tighter."
)
"""Says what the mark means, below a table."""
AVERAGE, CLOSED, BITS, MB, SECONDS = "average", "gap closed in %", "bits a weight", "MB", "seconds"


@dataclass(frozen=True)
class Column:
    """A column of numbers; None is a missing one. `better`: 1 if larger values are, -1 if smaller, 0 if neither."""

    name: str
    values: tuple[float | None, ...]
    digits: int
    better: int = 0

    def shown(self, row: int) -> str:
        """The value as text; empty if it is missing."""
        value = self.values[row]
        return "" if value is None else f"{round(value, self.digits) + 0.0:.{self.digits}f}"  # no -0

    def best(self) -> int | None:
        """The row of the best value, the first of several; None without a value."""
        found = [(self.better * value, -row) for row, value in enumerate(self.values) if value is not None]
        return -max(found)[1] if found else None

    def ranked(self, place: int) -> str | None:
        """The best (0) or second (1) value as it is shown; None if there is none, or only one value."""
        order = sorted({float(self.shown(row)) for row, value in enumerate(self.values) if value is not None})
        if self.better > 0:
            order.reverse()
        return f"{order[place]:.{self.digits}f}" if self.better and len(order) > max(1, place) else None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side. `settings`: of each option that differs, the value in each run, as text. `errors`: the
    standard error of each average, in its unit. `near`: whether an average is the best or within the noise of it; empty
    if that is not known."""

    folders: tuple[str, ...]
    settings: dict[str, tuple[str, ...]]
    columns: tuple[Column, ...]
    metric: str
    errors: tuple[float | None, ...] = ()
    near: tuple[bool, ...] = ()

    def cell(self, column: Column, row: int) -> str:
        """The value of a column as text; an average within the noise of the best has a mark in front."""
        text = column.shown(row)
        return f"{NEAR} {text}" if column is self.column(AVERAGE) and self._marked(row) else text

    @property
    def legend(self) -> str:
        """What the mark means; empty if no row has it."""
        return LEGEND if any(map(self._marked, range(len(self.folders)))) else ""

    def _marked(self, row: int) -> bool:
        average = self.column(AVERAGE)
        best = average.best()
        return best is not None and bool(self.near) and self.near[row] and average.shown(row) != average.shown(best)

    def column(self, name: str) -> Column:
        """The column of a name, behind those of the tasks."""
        return next(column for column in reversed(self.columns) if column.name == name)

    def label(self, row: int) -> str:
        """The settings of a run as one text; without any, its folder."""
        values = [f"{key}={values[row]}" for key, values in self.settings.items() if key != NAMED]
        return " ".join(values) or self.folders[row].rpartition("/")[2]


def compared(runs: Sequence[Run]) -> Comparison:
    """The table of these runs."""
    contents = [run.content for run in runs]
    metric = next(filter(None, map(numbers.metric_of_average, contents)), "")
    settings = _settings(contents)
    if not settings:
        settings = {NAMED: tuple(run.folder.name for run in runs)}
    tasks = list(dict.fromkeys(task for content in contents for task in numbers.scores_of(content)["tasks"]))
    columns = [_task(contents, task) for task in tasks]
    average = _scores(AVERAGE, [_average(content).get(numbers.RESULT) for content in contents], metric)
    errors = _scores("", [_error(content) for content in contents], metric).values
    columns.append(average)
    shares = [numbers.closed_gap(_average(content), numbers.metric_of_average(content)) for content in contents]
    columns += [
        Column(CLOSED, tuple(None if share is None else 100 * share for share in shares), 0, 1),
        Column(BITS, tuple(content.get("average_bits") for content in contents), 2),
        Column(MB, tuple(numbers.megabytes(content) for content in contents), 2),
        Column(SECONDS, tuple(numbers.seconds(content) for content in contents), 1),
    ]
    near = _near(average, errors, [_samples(content) for content in contents])
    return Comparison(tuple(str(run.folder) for run in runs), settings, tuple(columns), metric, errors, near)


def _settings(contents: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The overrides that are not the same in all runs; a run without one has the value of its config."""
    given = [overrides_of(content) for content in contents]
    keys = [key for key in dict.fromkeys(key for own in given for key in own) if key not in ASIDE]
    values = {
        key: tuple(
            own[key] if key in own else value_at(content["config"], key)
            for own, content in zip(given, contents, strict=True)
        )
        for key in keys
    }
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _average(content: Mapping[str, Any]) -> Mapping[str, float]:
    average: Mapping[str, float] = numbers.scores_of(content)["average"]
    return average


def _error(content: Mapping[str, Any]) -> float | None:
    """The standard error of the result's average; earlier versions of epmq wrote none."""
    errors: Mapping[str, Any] = numbers.scores_of(content).get("standard_errors") or {"average": {}}
    error: float | None = errors["average"].get(numbers.RESULT)
    return error


def _samples(content: Mapping[str, Any]) -> tuple[Any, Any]:
    """The metrics and the numbers of samples, which runs must share to be compared."""
    scores = numbers.scores_of(content)
    return scores["metrics"], scores.get("samples")


def _near(average: Column, errors: Sequence[float | None], samples: Sequence[Any]) -> tuple[bool, ...]:
    """Whether each run's average differs from the best one by at most the standard error of their difference. That of
    independent samples is larger than the true one, which makes up for asking for one error only."""
    best = average.best()
    if best is None or average.values[best] is None or errors[best] is None:
        return ()
    top, noise = average.values[best], errors[best]
    assert top is not None and noise is not None
    return tuple(
        value is not None
        and error is not None
        and own == samples[best]
        and abs(value - top) <= math.hypot(error, noise)
        for value, error, own in zip(average.values, errors, samples, strict=True)
    )


def _task(contents: Sequence[Mapping[str, Any]], task: str) -> Column:
    all_scores = [numbers.scores_of(content) for content in contents]
    metric = next(scores["metrics"][task] for scores in all_scores if task in scores["metrics"])
    return _scores(task, [scores["tasks"].get(task, {}).get(numbers.RESULT) for scores in all_scores], metric)


def _scores(name: str, scores: Sequence[float | None], metric: str) -> Column:
    unscaled = metric in numbers.NOT_SHARES
    values = tuple(None if score is None else score * (1 if unscaled else 100) for score in scores)
    return Column(name, values, 2 if unscaled else 1, -1 if metric in numbers.LOWER_IS_BETTER else 1)


def swept(comparison: Comparison) -> list[str]:
    """The settings that are numbers in every run."""
    return [key for key, values in comparison.settings.items() if key != NAMED and all(map(is_number, values))]


def is_number(text: str) -> bool:
    """Whether a value is a finite number."""
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def pareto(points: Sequence[tuple[float, float]], better: int) -> list[int]:
    """The indices of the points (size, score) that no other point beats in one number and equals in the other, by
    size."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -better * points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or better * points[index][1] > better * points[front[-1]][1]:
            front.append(index)
    return front


Renderer = Callable[[Comparison], str]
