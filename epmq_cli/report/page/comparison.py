"""The page that compares runs: the table, score against size, and lines or a heat map of numbers that were swept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from epmq_cli.report.comparison import AVERAGE, MB, Column, Comparison, compared, pareto, swept
from epmq_cli.report.numbers import PLAIN
from epmq_cli.report.page import scores, svg
from epmq_cli.report.page.assembly import assembled, filled
from epmq_cli.report.page.heat_map import Cell, linear, matrix
from epmq_cli.report.plain_counterpart import with_plain
from epmq_cli.report.run_folders import Run
from epmq_cli.report.table import counted
from epmq_cli.runtime.console import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 8
DASHES = ("-", "--", ":", "-.")
Section = Callable[[Comparison], dict[str, Any] | None]
Point = tuple[float, float, int]
"""The place of a run in a plot, and its row."""


def comparison_page(runs: Sequence[Run]) -> str:
    """One self-contained HTML file about several runs."""
    comparison = compared(runs)
    best = _average(comparison).best()
    sentence = f"{counted(len(runs), 'run')}" + (
        f"; {comparison.label(best)} has the best average, {_average(comparison).shown(best)}."
        if best is not None
        else "."
    )
    sections: dict[str, Section] = {**SECTIONS, "scores": partial(tasks, runs), "comparison": table}
    return assembled("Comparison of runs", plain(sentence), filled(sections, comparison))


def tasks(runs: Sequence[Run], comparison: Comparison) -> dict[str, Any] | None:
    """The scores by task of the best run whose plain counterpart is among the runs, else of the best run; None without
    scores."""
    average = _average(comparison)
    scored = [row for row, value in enumerate(average.values) if value is not None]
    order = sorted(scored, key=lambda row: -average.better * (average.values[row] or 0))
    contents = {row: with_plain(runs[row].content, runs) for row in order}
    known = [row for row in order if PLAIN in contents[row]["scores"]["average"]]
    if not order:
        return None
    row = (known or order)[0]
    found = scores.section(contents[row])
    which = "run with the best average" if row == order[0] else "best run whose plain GPTQ is known"
    heading = f"Scores of {plain(comparison.label(row))}"
    return None if found is None else found | scores.headed(heading, f"This is the {which}.")


def table(comparison: Comparison) -> dict[str, Any]:
    """The table of all runs."""
    return {"comparison": comparison, "rows": range(len(comparison.folders))}


def sizes(comparison: Comparison) -> dict[str, Any] | None:
    """Score against MB; None with fewer than two runs that have both."""
    points = [
        (size, score, row)
        for row, (size, score) in enumerate(zip(comparison.column(MB).values, _average(comparison).values, strict=True))
        if size is not None and score is not None
    ]
    if len(points) < 2:
        return None
    front = [points[index] for index in pareto([point[:2] for point in points], _average(comparison).better)]
    names = [f"{number + 1}. {comparison.label(row)}" for number, (_, _, row) in enumerate(front)]
    said = f"No other run is both smaller and better than {counted(len(front), 'run')}: {'; '.join(names)}."
    draw = partial(_sizes, comparison, points, front)
    return {"figure": svg.figure("sizes", "Average score against size in MB", said, draw), "front": names}


def lines(comparison: Comparison) -> dict[str, Any] | None:
    """The average over the number that was swept, a line for each combination of the other settings; None if not
    exactly one number was swept."""
    numbers = swept(comparison)
    if len(numbers) != 1:
        return None
    others = [key for key in comparison.settings if key != numbers[0]]
    series: dict[str, list[Point]] = {}
    for row, score in enumerate(_average(comparison).values):
        name = " ".join(f"{key}={comparison.settings[key][row]}" for key in others)
        if score is not None:
            series.setdefault(name, []).append((float(comparison.settings[numbers[0]][row]), score, row))
    if len(series) > MOST_LINES or max(map(len, series.values()), default=0) < 2:
        return None
    said = f"{counted(len(series), 'line')} over {numbers[0]}; the table has the numbers."
    draw = partial(_lines, comparison, numbers[0], {name: sorted(points) for name, points in series.items()})
    return {"key": numbers[0], "figure": svg.figure("lines", f"Average score by {numbers[0]}", said, draw)}


def grid(comparison: Comparison) -> dict[str, Any] | None:
    """A heat map of the average over two numbers; None if not exactly these two settings differ."""
    numbers = swept(comparison)
    if len(numbers) != 2 or len(comparison.settings) != 2:
        return None
    cells = {
        (float(comparison.settings[numbers[0]][row]), float(comparison.settings[numbers[1]][row])): score
        for row, score in enumerate(_average(comparison).values)
        if score is not None
    }
    if len(cells) < 2:
        return None
    said = f"Average for {numbers[0]} (rows) and {numbers[1]} (columns); darker is better."
    figure = svg.figure("grid", "Average score by two options", said, partial(_grid, comparison, numbers, cells))
    return {"keys": numbers, "figure": figure}


SECTIONS: dict[str, Section] = {
    "sizes": sizes,
    "lines": lines,
    "grid": grid,
}
"""The plots of the page in their order, by template; the scores of one run and the table follow."""


def _average(comparison: Comparison) -> Column:
    return comparison.column(AVERAGE)


def _axis(comparison: Comparison) -> str:
    return f"average {comparison.metric}{'' if _average(comparison).digits == 2 else ' in %'}"


def _plot(width: int, below: str, beside: str, right: float = 24) -> tuple[Figure, Any]:
    """Axes with a grid, the name of the height on top and that of the width below."""
    figure = svg.canvas(width, 330)
    axes = svg.place(figure, 46, 34, width - 46 - right, 240)
    axes.grid(color=svg.LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(labelcolor=svg.MUTED)
    axes.set_xlabel(below)
    figure.text(0, 1 - 14 / 330, beside, color=svg.MUTED)
    return figure, axes


def _sizes(comparison: Comparison, points: list[Point], front: list[Point], width: int) -> Figure:
    """All runs as dots; those that no other beats in the accent colour, with their numbers in the list."""
    figure, axes = _plot(width, "MB", _axis(comparison))
    axes.margins(0.1, 0.12)
    beaten = [point for point in points if point not in front]
    axes.plot(
        [point[0] for point in beaten],
        [point[1] for point in beaten],
        "o",
        color=svg.MUTED,
        markersize=7,
        clip_on=False,
    )
    axes.step(
        [point[0] for point in front], [point[1] for point in front], where="post", color=svg.ACCENT, linewidth=1.5
    )
    axes.plot([point[0] for point in front], [point[1] for point in front], "o", color=svg.ACCENT, markersize=9)
    for number, (size, score, _) in enumerate(front):
        axes.annotate(str(number + 1), (size, score), (0, 8), textcoords="offset points", ha="center", va="bottom")
    return figure


def _lines(comparison: Comparison, key: str, series: dict[str, list[Point]], width: int) -> Figure:
    """A line for each combination of the other settings, with its name at the end; the best one in the accent
    colour."""
    best = _average(comparison).best()
    names = [svg.shortened(name, width * 0.3) for name in series]
    figure, axes = _plot(width, key, _axis(comparison), max(map(len, names)) * 6.8 + 24)
    for index, points in enumerate(series.values()):
        chosen = any(point[2] == best for point in points)
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        dash = "-" if chosen else DASHES[index % len(DASHES)]
        colour = svg.ACCENT if chosen else svg.MUTED
        axes.plot(xs, ys, dash, marker="o", color=colour, linewidth=2 if chosen else 1.5, markersize=6)
    low, high = axes.get_ylim()
    ends = apart([points[-1][1] for points in series.values()], 15 * (high - low) / 240)
    for name, end, points in zip(names, ends, series.values(), strict=True):
        colour = svg.ACCENT if any(point[2] == best for point in points) else svg.MUTED
        svg.label(axes, name, end, axes.bbox.width + 8, color=colour)
    axes.set_xticks(sorted({point[0] for points in series.values() for point in points}))
    axes.xaxis.set_major_formatter("{x:g}")
    return figure


def apart(heights: list[float], least: float) -> list[float]:
    """The heights of labels, moved up where two are nearer than `least`."""
    placed: dict[int, float] = {}
    above = -float("inf")
    for index in sorted(range(len(heights)), key=lambda index: heights[index]):
        above = placed[index] = max(heights[index], above + least)
    return [placed[index] for index in range(len(heights))]


def _grid(comparison: Comparison, keys: list[str], cells: dict[tuple[float, float], float], width: int) -> Figure:
    """Rows of the first option, columns of the second, the average in each cell; better ones are darker."""
    rows, columns = (sorted({cell[part] for cell in cells}) for part in (0, 1))
    average = _average(comparison)
    level = linear([average.better * score for score in cells.values()])
    places = {
        (rows.index(first), columns.index(second)): Cell(average.better * score, f"{score:.{average.digits}f}")
        for (first, second), score in cells.items()
    }
    lines, heads = ([f"{value:g}" for value in values] for values in (rows, columns))
    return matrix(lines, heads, places, level, width, (keys[0], keys[1]))
