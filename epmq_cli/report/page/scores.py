"""Scores by task: the base, the dense merge, the result and the experts on one line, with the gap that is closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from epmq_cli.report import numbers
from epmq_cli.report.page import svg
from epmq_cli.runtime.console import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AVERAGE = "average"
ROW, TOP, BOTTOM = 28, 24, 34  # pixels


@dataclass(frozen=True)
class Row:
    """The scores of a task, or of the average, by stage."""

    name: str
    metric: str
    scores: Mapping[str, float]

    @property
    def closed(self) -> str:
        """The share of the gap that is closed, as text."""
        share = numbers.closed_gap(self.scores, self.metric)
        return "" if share is None else f"{100 * share:.0f}%"

    def value(self, stage: str) -> str:
        """The score of a stage as text."""
        return numbers.shown(self.scores.get(stage), self.metric)


def section(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dot plots and the table; None without scores."""
    rows = list(rows_of(numbers.scores_of(content)))
    if not rows:
        return None
    panels = [
        svg.figure(panel.name, panel.title, f"{panel.said} The table below has all numbers.", panel.draw)
        for panel in panels_of(rows)
    ]
    stages = [stage for stage in numbers.STAGES if any(stage in row.scores for row in rows)]
    return {
        "figures": panels,
        "rows": rows,
        "stages": stages,
        "metric": _kind(rows),
        **headed("Scores", _noise(content)),
    }


def headed(heading: str, note: str) -> dict[str, str]:
    """The heading of the section, and a further sentence below it."""
    return {"heading": heading, "note": note}


def _noise(content: Mapping[str, Any]) -> str:
    """The standard error of the result's average in words; empty if it is not known."""
    errors = numbers.scores_of(content).get("standard_errors", {"average": {}})["average"]
    if numbers.RESULT not in errors:
        return ""
    error = numbers.shown(errors[numbers.RESULT], numbers.metric_of_average(content))
    return f"The standard error of the result's average is {error}."


@dataclass(frozen=True)
class Panel:
    """A dot plot: its name, its metric, its title, the last row in words, and the function that draws it."""

    name: str
    kind: str
    title: str
    said: str
    draw: svg.Draw


def panels_of(rows: Sequence[Row]) -> list[Panel]:
    """The plots of shares and of perplexities, as far as there are any."""
    panels = []
    for name, unscaled in (("scores", False), ("perplexities", True)):
        part = [row for row in rows if (row.metric in numbers.NOT_SHARES) == unscaled]
        if part:
            panels.append(Panel(name, _kind(part), _title(part), _described(part), partial(_dots, part)))
    return panels


def rows_of(scores: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of the tasks and of their average."""
    for task, by_stage in scores["tasks"].items():
        yield Row(plain(task), scores["metrics"][task], by_stage)
    if len(scores["tasks"]) > 1:
        yield Row(AVERAGE, next(iter(scores["metrics"].values())), scores["average"])


def _kind(rows: list[Row]) -> str:
    kinds = {row.metric for row in rows if row.name != AVERAGE}
    kind = kinds.pop() if len(kinds) == 1 else "score"
    return kind if kind in numbers.NOT_SHARES else f"{kind} in %"


def _title(rows: list[Row]) -> str:
    return f"{_kind(rows).capitalize()} of base, merge, result and experts by task"


def _described(rows: list[Row]) -> str:
    """The last row in words."""
    last = rows[-1]
    values = ", ".join(f"{stage} {last.value(stage)}" for stage in numbers.STAGES if stage in last.scores)
    closed = f"; {last.closed} of the gap from the merge to the experts is closed" if last.closed else ""
    return f"{last.name}: {values}{closed}."


def _dots(rows: list[Row], width: int) -> Figure:
    """One line a task: marks for the stages, a bar from the merge to the result, columns of numbers at the right."""
    left = svg.gutter([row.name for row in rows], width)
    columns: list[tuple[float, str, Callable[[Row], str]]] = [
        (60.0, "result", lambda row: row.value(numbers.RESULT)),
        (76.0, "gap closed", lambda row: row.closed),
    ]
    if width < svg.WIDE:
        columns = columns[:1]
    right = sum(column[0] for column in columns)
    figure = svg.canvas(width, TOP + ROW * len(rows) + BOTTOM)
    span = width - left - right
    axes = svg.place(figure, left, TOP, span, ROW * len(rows))
    _scale(axes, rows)
    heading_at = span
    for index, row in enumerate(rows):
        bold = "bold" if row.name == AVERAGE else "normal"
        svg.label(axes, svg.shortened(row.name, left - 12), index, -left, fontweight=bold)
        marks(axes, index, row.scores)
        offset = 0.0
        for space, _, value in columns:
            offset += space
            svg.label(axes, value(row), index, span + offset, fontweight=bold, ha="right")
    for space, heading, _ in columns:
        heading_at += space
        svg.label(axes, heading, -1, heading_at, color=svg.MUTED, fontsize=11, ha="right")
    return figure


def _scale(axes: Axes, rows: list[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    values = [score for row in rows for score in row.scores.values()]
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    if rows[0].metric in numbers.NOT_SHARES:
        axes.set_xscale("log")
        axes.set_xlim(max(values) * 1.15, min(values) / 1.15)  # better scores at the right, as in the other plots
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(4, prune=None))
    else:
        pad = max(0.03, 0.06 * (max(values) - min(values)))
        axes.set_xlim(min(values) - pad, max(values) + pad)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.grid(axis="x", color=svg.LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", pad=6)


def marks(axes: Axes, index: int, scores: Mapping[str, float]) -> None:
    """Draws the marks of one row."""
    stages = (numbers.MERGED, numbers.RESULT, numbers.EXPERTS, numbers.BASE, numbers.PLAIN)
    merged, result, experts, base, plain = map(scores.get, stages)
    if merged is not None and experts is not None:
        axes.plot([merged, experts], [index, index], color=svg.SOFT, linewidth=6, solid_capstyle="round", zorder=2)
    if merged is not None and result is not None:
        axes.plot([merged, result], [index, index], color=svg.ACCENT, linewidth=2.5, zorder=3)
    if base is not None:
        axes.plot([base], [index], "o", markersize=5, color=svg.MUTED, zorder=4)
    if experts is not None:
        axes.plot([experts], [index], "|", markersize=15, color=svg.INK, markeredgewidth=2.5, zorder=4)
    if merged is not None:
        axes.plot(
            [merged],
            [index],
            "o",
            markersize=8,
            markerfacecolor=svg.PAPER,
            color=svg.ACCENT,
            markeredgewidth=2,
            zorder=5,
        )
    if plain is not None:
        axes.plot(
            [plain],
            [index],
            "D",
            markersize=6,
            markerfacecolor=svg.PAPER,
            color=svg.INK,
            markeredgewidth=1.5,
            zorder=5.5,
        )
    if result is not None:
        axes.plot([result], [index], "o", markersize=10, color=svg.ACCENT, markeredgewidth=0, zorder=6)
