"""The table of several runs: a row a run, with the overrides that differ, scores, size and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epmq_cli.report import numbers
from epmq_cli.report.run_folders import Run, overrides_of
from epmq_cli.report.settings import value_at

ASIDE = ("out", "device", "cache", "resume")
"""Options that do not tell runs apart."""
NAMED = "run"
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

    def ranked(self, place: int) -> str | None:
        """The best (0) or second (1) value as it is shown; None if there is none, or only one value."""
        order = sorted({float(self.shown(row)) for row, value in enumerate(self.values) if value is not None})
        if self.better > 0:
            order.reverse()
        return f"{order[place]:.{self.digits}f}" if self.better and len(order) > max(1, place) else None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side. `settings`: of each option that differs, the value in each run, as text."""

    folders: tuple[str, ...]
    settings: dict[str, tuple[str, ...]]
    columns: tuple[Column, ...]
    metric: str

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
    columns.append(_scores(AVERAGE, [_average(content).get(numbers.RESULT) for content in contents], metric))
    shares = [numbers.closed_gap(_average(content), numbers.metric_of_average(content)) for content in contents]
    columns += [
        Column(CLOSED, tuple(None if share is None else 100 * share for share in shares), 0, 1),
        Column(BITS, tuple(content.get("average_bits") for content in contents), 2),
        Column(MB, tuple(numbers.megabytes(content) for content in contents), 2),
        Column(SECONDS, tuple(numbers.seconds(content) for content in contents), 1),
    ]
    return Comparison(tuple(str(run.folder) for run in runs), settings, tuple(columns), metric)


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
