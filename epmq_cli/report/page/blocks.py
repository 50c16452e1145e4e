"""The error of each block's output before and after `refine=blocks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from epmq_cli.report.page import svg
from epmq_cli.report.table import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE, AFTER = "held_out_before", "held_out"


def section(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plot of the errors and the rows of its table; None without refined blocks."""
    blocks = content.get("blocks", [])
    if not blocks:
        return None
    changed = [block for block in blocks if block["iteration"]]
    before, after = (sum(block[key] for block in blocks) / len(blocks) for key in (BEFORE, AFTER))
    said = (
        f"{len(changed)} of {counted(len(blocks), 'block')} changed; the mean error on the samples that choose the "
        f"result falls from {before:.3g} to {after:.3g}."
        if changed
        else "No block changed: no iteration lowered the error on the samples that choose the result."
    )
    title = "Error of each block's output before and after its refinement"
    return {"said": said, "blocks": blocks, "figure": svg.figure("blocks", title, said, partial(_falls, blocks))}


def _falls(blocks: Sequence[Mapping[str, Any]], width: int) -> Figure:
    """A line for each block in the order of the walk, from an open circle, before, to a filled one."""
    from matplotlib.ticker import MaxNLocator

    figure = svg.canvas(width, 250)
    axes = svg.place(figure, 60, 14, width - 76, 184)
    places = range(1, len(blocks) + 1)
    before, after = ([block[key] for block in blocks] for key in (BEFORE, AFTER))
    size = max(3.0, min(9.0, 0.6 * width / len(blocks)))
    axes.vlines(places, after, before, color=svg.ACCENT, linewidth=2, zorder=2)
    axes.plot(
        places,
        before,
        "o",
        color=svg.ACCENT,
        markersize=size - 1,
        markerfacecolor=svg.PAPER,
        markeredgewidth=1.5,
        zorder=3,
    )
    axes.plot(places, after, "o", color=svg.ACCENT, markersize=size, markeredgewidth=0, zorder=4)
    axes.set_ylim(0, 1.08 * max(*before, *after) or 1)
    axes.set_xlim(0.5, len(blocks) + 0.5)
    axes.grid(axis="y", color=svg.LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(min(12, len(blocks)), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelcolor=svg.MUTED)
    axes.set_xlabel("block, in the order of the walk")
    return figure
