"""Heat maps over blocks and linears: the relative loss of each linear, and its bits where they differ."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from epmq_cli.report.page import svg
from epmq_cli.runtime.console import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 40
ROW, GAP, HEADING = 22, 34, 22  # pixels
DARK = 5
"""The steps of the colour scale from here on need light text, in dark mode dark text."""
FALLBACK = "\u00d7"  # a cross
SQUARE = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))
READABLE = 20  # pixels of a cell with a number in it
ALONE = ""
"""The stack of linears outside blocks."""

Level = Callable[[float], int]
"""The step of the colour scale for a value."""


@dataclass(frozen=True)
class Cell:
    """A linear's value and the text in its cell."""

    value: float
    mark: str = ""


Stack = dict[str, dict[int, Cell]]
"""linear -> block -> cell."""


def section(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The heat map of losses, and the rows of its table; None if no inputs were measured."""
    layers = [layer for layer in content.get("layers", []) if layer["loss"] is not None]
    if not layers:
        return None
    losses = [layer["loss"] for layer in layers]
    worst = max(layers, key=lambda layer: layer["loss"])
    fallen = [layer for layer in layers if layer["fallback"]]
    level = logarithmic(losses)
    stacks = by_stack(layers, lambda layer: Cell(layer["loss"], FALLBACK if layer["fallback"] else ""))
    fell = f" {len(fallen)} of {len(layers)} linears fell back, marked {FALLBACK}." if fallen else ""
    said = f"From {min(losses):.2g} to {max(losses):.2g}; the largest is that of {plain(worst['name'])}.{fell}"
    return {
        "figure": svg.figure("losses", "Relative loss by block and linear", said, partial(heat_map, stacks, level)),
        "low": f"{min(losses):.2g}",
        "high": f"{max(losses):.2g}",
        "worst": worst,
        "fallen": fallen,
        "layers": content["layers"],
    }


def bits_section(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The map of bits; None if all linears have the same."""
    layers = [layer for layer in content.get("layers", []) if layer["bits"] is not None]
    widths = sorted({layer["bits"] for layer in layers})
    if len(widths) < 2:
        return None
    steps = {width: round(1 + 6 * index / (len(widths) - 1)) for index, width in enumerate(widths)}
    counts = [(width, sum(layer["bits"] == width for layer in layers), f"heat-{steps[width]}") for width in widths]
    stacks = by_stack(layers, lambda layer: Cell(layer["bits"], str(layer["bits"])))
    said = ", ".join(f"{count} linears with {width} bits" for width, count, _ in counts)
    return {
        "figure": svg.figure(
            "bits", "Bits by block and linear", said + ".", partial(heat_map, stacks, lambda value: steps[int(value)])
        ),
        "counts": counts,
        "average": content.get("average_bits"),
        "layers": layers,
    }


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
            if mark and (mark == FALLBACK or cell >= READABLE):
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
