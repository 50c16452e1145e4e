"""The loss of refinement on held-out samples, by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from epmq_cli.report.page import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"dense": "before quantization", "packed": "of the quantized model"}


def section(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """One plot for each training with its table; None without refinement."""
    trainings = []
    for part, training in content.get("refine", {}).items():
        trials = [trial for trial in training["trials"] if trial["losses"]]
        if not trials:
            continue
        best = min(trials, key=lambda trial: float(trial["losses"][trial["best"]]))
        first, last = best["losses"][0], best["losses"][best["best"]]
        said = f"From {first:.4g} before the first epoch to {last:.4g} after epoch {best['best']}."
        trainings.append(
            {
                "name": NAMES.get(part, part),
                "figure": svg.figure(
                    f"refine{part}",
                    f"Held-out loss by epoch, training {NAMES.get(part, part)}",
                    said,
                    partial(_lines, trials, best),
                ),
                "said": said,
                "refined": training["refined"],
                "trials": trials,
                "best": best,
            }
        )
    return {"trainings": trainings} if trainings else None


def _lines(trials: list[dict[str, Any]], best: dict[str, Any], width: int) -> Figure:
    """The losses of all trials; the best one in the accent colour, with a mark at its best epoch."""
    from matplotlib.ticker import MaxNLocator

    figure = svg.canvas(width, 240)
    axes = svg.place(figure, 52, 12, width - 76, 180)
    for trial in trials:
        chosen = trial is best
        colour = svg.ACCENT if chosen else svg.MUTED
        axes.plot(
            range(len(trial["losses"])),
            trial["losses"],
            color=colour,
            linewidth=2 if chosen else 1,
            zorder=3 if chosen else 2,
        )
    epoch = best["best"]
    axes.plot([epoch], [best["losses"][epoch]], "o", color=svg.ACCENT, markersize=8, markeredgewidth=0, zorder=4)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.grid(axis="y", color=svg.LINE, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelcolor=svg.MUTED)
    axes.set_xlabel("epoch")
    return figure
