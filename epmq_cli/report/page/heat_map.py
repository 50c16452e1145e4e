"""Heat maps: of the blocks and linears of a model, and of rows and columns."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epmq_cli.report.page import svg
from epmq_cli.runtime.console import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 40
ROW, GAP, HEADING = 22, 34, 22  # pixels
LINE, SIDE, FEW = 34, 90, 10
"""The height of a row of a matrix of few rows, the most that a cell is wide, and how many rows are few."""
DARK = 5
"""The steps of the colour scale from here on need light text, in dark mode dark text."""
FALLBACK = "\u00d7"  # a cross
SQUARE = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))
ALONE = ""
"""The stack of linears outside blocks."""

Level = Callable[[float], int]
"""The step of the colour scale for a value."""


@dataclass(frozen=True)
class Cell:
    """A value and the text in its cell."""

    value: float
    mark: str = ""


Stack = dict[str, dict[int, Cell]]
"""linear -> block -> cell."""


def by_stack(layers: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], Cell]) -> dict[str, Stack]:
    """stack -> linear -> block -> cell. The block is the first number in a linear's name; before it is the name of the
    stack, behind it that of the linear. In models with many linears a block, the experts of a mixture share a row,
    which shows their largest value."""
    names = {layer["name"]: _split(plain(layer["name"])) for layer in layers}
    many = len({(stack, linear) for stack, _, linear in names.values()}) > MOST_ROWS
    stacks: dict[str, Stack] = {}
    for layer in layers:
        stack, block, linear = names[layer["name"]]
        row = stacks.setdefault(stack, {}).setdefault(re.sub(r"\.\d+(?=\.)", ".*", linear) if many else linear, {})
        new = cell(layer)
        if block not in row or row[block].value < new.value:
            row[block] = new
    return stacks


def _split(name: str) -> tuple[str, int, str]:
    match = re.fullmatch(r"(.*?)\.?(?<![\w])(\d+)\.(.+)", name)
    return (match[1], int(match[2]), match[3]) if match else (ALONE, 0, name)


def logarithmic(values: Sequence[float]) -> Level:
    """Steps of the colour scale that are even on a logarithmic scale between the least and the largest value."""
    positive = [value for value in values if value > 0]
    low, high = (math.log(choose(positive)) for choose in (min, max)) if positive else (0.0, 0.0)

    def level(value: float) -> int:
        if value <= 0 or high == low:
            return 0
        return max(0, min(8, int(9 * (math.log(value) - low) / (high - low))))

    return level


def linear(values: Sequence[float]) -> Level:
    """Steps of the colour scale that are even between the least and the largest value."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    return lambda value: round(8 * (value - low) / (high - low)) if high > low else 0


def heat_map(stacks: Mapping[str, Stack], level: Level, width: int) -> Figure:
    """One map a stack, below each other: blocks from left to right, linears as rows."""
    left = svg.gutter([linear for stack in stacks.values() for linear in stack], width)
    several = len({*stacks} - {ALONE}) > 1
    heights = [
        (HEADING * several if name else 0, ROW * len(stack), GAP if name else 8) for name, stack in stacks.items()
    ]
    figure = svg.canvas(width, sum(map(sum, heights)))
    top = 0.0
    for (name, stack), (heading, height, gap) in zip(stacks.items(), heights, strict=True):
        axes = _map(figure, stack, level, left, top + heading)
        if heading:
            svg.label(axes, svg.shortened(name, width), -0.5, -left, color=svg.MUTED)
        if name == ALONE:
            axes.set_xticks([])
        top += heading + height + gap
    return figure


def _map(figure: Figure, stack: Stack, level: Level, left: float, top: float) -> Axes:
    """The cells of one stack, with the names of linears and the numbers of blocks."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    blocks = sorted({block for row in stack.values() for block in row})
    cell = min((figure.get_figwidth() * 72 - left - 8) / len(blocks), 64.0)
    axes = svg.place(figure, left, top, cell * len(blocks), ROW * len(stack))
    axes.set_xlim(0, len(blocks))
    axes.set_ylim(len(stack), 0)
    side = 1 - 2 * min(0.06, 0.6 / cell)
    boxes: dict[int, list[Path]] = {}
    for line, row in enumerate(stack.values()):
        for column, block in enumerate(blocks):
            if block not in row:
                continue
            step, mark = level(row[block].value), row[block].mark
            corner = (column + (1 - side) / 2, line + 0.05)
            boxes.setdefault(step, []).append(Path(np.array(SQUARE) * (side, 0.9) + corner, closed=True))
            if mark and (mark == FALLBACK or _fits(mark, cell)):
                colour = svg.PAPER if step >= DARK else svg.INK
                svg.label(
                    axes, mark, line + 0.54, (column + 0.5) * cell, color=colour, ha="center", fontsize=min(12, cell)
                )
    for step, paths in boxes.items():  # one path a colour keeps the page small
        whole = Path.make_compound_path(*paths)
        axes.add_patch(PathPatch(whole, facecolor=svg.HEAT[step], edgecolor="none", clip_on=False))
    axes.set_yticks([])
    for line, name in enumerate(stack):
        svg.label(axes, svg.shortened(name, left - 8), line + 0.5, -left, fontsize=11)
    every = max(1, math.ceil(26 / cell))
    shown = range(0, len(blocks), every)
    axes.set_xticks([column + 0.5 for column in shown], [str(blocks[column]) for column in shown])
    axes.tick_params(axis="x", labelsize=11)
    return axes


def _fits(mark: str, width: float) -> bool:
    """Whether a text fits into a cell of so many pixels."""
    return width >= 6.8 * len(mark) + 8


def matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], Cell],
    level: Level,
    width: int,
    names: tuple[str, str] = ("", ""),
) -> Figure:
    """One cell for each row and column, with its text where there is room. `names`: of the rows and the columns."""
    from matplotlib.patches import Rectangle

    left = max(svg.gutter([*rows], width), 48.0)
    side = min((width - left - 8) / len(columns), SIDE)
    height, top = LINE if len(rows) <= FEW else ROW, 24 if names[0] else 2
    figure = svg.canvas(width, top + height * len(rows) + (52 if names[1] else 30))
    axes = svg.place(figure, left, top, side * len(columns), height * len(rows))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    for (line, column), cell in cells.items():
        step = level(cell.value)
        axes.add_patch(Rectangle((column + 0.02, line + 0.04), 0.96, 0.92, facecolor=svg.HEAT[step], clip_on=False))
        if _fits(cell.mark, side):
            colour = svg.PAPER if step >= DARK else svg.INK
            svg.label(axes, cell.mark, line + 0.52, (column + 0.5) * side, color=colour, ha="center")
    axes.set_yticks([])
    for line, name in enumerate(rows):
        svg.label(axes, svg.shortened(name, left - 12), line + 0.5, -8, ha="right", color=svg.MUTED)
    every = max(1, math.ceil((6.8 * max(map(len, columns)) + 8) / side))
    shown = range(0, len(columns), every)
    axes.set_xticks([column + 0.5 for column in shown], [columns[column] for column in shown])
    if names[0]:
        svg.label(axes, svg.shortened(names[0], width / 2), -14 / height, -left, color=svg.MUTED)
    axes.set_xlabel(names[1])
    return figure
