"""The dot plots of the scores as PNG files, for model cards: pages that show a README load no styles, and some of them
no SVG."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.checkpoint.model_card import Picture
from epmq_cli.report import numbers
from epmq_cli.report.page import svg
from epmq_cli.report.page.scores import Panel, marks, panels_of, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("epmq")

LEGEND, MARGIN, SHARP = 30, 16, 2  # pixels, and dots a pixel
WIDTH = svg.WIDE + 2 * MARGIN
VARIABLE = re.compile(r"--([\w-]+): (#[0-9a-f]{6})")
COLOURED = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")
NAMES = {numbers.BASE: "base", numbers.MERGED: "dense merge", numbers.RESULT: "result", numbers.EXPERTS: "experts"}


def score_pictures(scores: Mapping[str, Any]) -> dict[str, Picture]:
    """The pictures by file name; `scores`: those of metrics.json. A failure is a warning, because the results are
    complete without a picture."""
    try:
        panels = panels_of(list(rows_of(scores)))
        return {f"{panel.name}.png": Picture(_png(panel, scores), f"{panel.title}. {panel.said}") for panel in panels}
    except Exception as error:  # whatever a drawing library raises
        log.warning("the model card has no picture of the scores (%s: %s)", type(error).__name__, error)
        log.debug("the reason", exc_info=True)
        return {}


def _png(panel: Panel, scores: Mapping[str, Any]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with svg.style(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        figure = _framed(panel, [stage for stage in numbers.STAGES if stage in scores["average"]])
        canvas, file = FigureCanvasAgg(figure), io.BytesIO()
        figure.draw_without_rendering()  # makes the labels of ticks
        _colour(figure)
        canvas.print_png(file, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return file.getvalue()


def _framed(panel: Panel, stages: list[str]) -> Figure:
    """The plot with margins and a legend above it."""
    figure = panel.draw(svg.WIDE)
    (axes,), inner = figure.axes, figure.get_figheight() * 72
    left, bottom, width, height = axes.get_position().bounds
    whole = inner + LEGEND + 2 * MARGIN
    figure.set_size_inches(WIDTH / 72, whole / 72)
    figure.set_dpi(72 * SHARP)
    figure.set_facecolor(svg.PAPER)
    sides = ((left * svg.WIDE + MARGIN) / WIDTH, (bottom * inner + MARGIN) / whole)
    axes.set_position((*sides, width * svg.WIDE / WIDTH, height * inner / whole))
    legend = svg.place(figure, MARGIN, MARGIN, svg.WIDE, LEGEND - 8)
    legend.set_axis_off()
    legend.set_xlim(0, svg.WIDE)
    legend.set_ylim(0.5, -0.5)
    svg.label(legend, panel.kind, 0, svg.WIDE, color=svg.MUTED, ha="right")
    at = 6.0
    for stage in stages:
        marks(legend, 0, {stage: at})
        svg.label(legend, NAMES[stage], 0, at + 12, color=svg.MUTED)
        at += 12 + 7.2 * len(NAMES[stage]) + 28
    return figure


def _colour(figure: Figure) -> None:
    """Puts the colours of a light page in place of the placeholders."""
    from matplotlib.colors import to_hex

    for artist in figure.findobj():
        for name in COLOURED:
            found = getattr(artist, f"get_{name}", lambda: None)()
            if found is not None and not (isinstance(found, str) and found == "auto"):
                colour = _light().get(to_hex(found))
                if colour:
                    getattr(artist, f"set_{name}")(colour)


@cache
def _light() -> dict[str, str]:
    """The colours of a light page, by placeholder."""
    styles = Path(__file__).with_name("templates") / "style.css"
    light = styles.read_text(encoding="utf-8").partition("@media")[0]
    return {svg.COLOURS[name]: colour for name, colour in VARIABLE.findall(light) if name in svg.COLOURS}
