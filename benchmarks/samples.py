"""Measures how many calibration samples the methods need, and draws the curves.

    python benchmarks/samples.py --suites tiny
    EPMQ_VISION3_DATA=FOLDER python benchmarks/samples.py --suites tiny vision3 --seeds 0 1 2

Rows are those of quality.py at 4 bits. Results under --out are reused. The figure, docs/samples.svg, shows medians over
the seeds; it needs matplotlib. Rows with `+ refine` need 5 samples.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quality import Session

from epmq_cli.commands.hydra_app import quiet_libraries
from epmq_cli.data.held_out import HOLD

ROWS = {
    "GPTQ": "GPTQ of the merge",
    "E-PMQ": "E-PMQ",
    "FeatCal, dense": "FeatCal, 16 bits",
    "+ safe = feature": "feature",
    "+ refine": "feature + refine",
}
"""The names in the figure of the rows of quality.py."""

ACCURACY = "accuracy, %"
METRICS = {"smollm": "perplexity, lower is better"}
"""What the suites that do not measure accuracy measure."""

Curves = dict[str, dict[int, float]]
"""The accuracy in %, or the perplexity, by row and samples."""


def measure(suite: str, arguments: argparse.Namespace) -> tuple[Curves, dict[str, float]]:
    """Returns the curves of a suite, and the accuracies of its experts and base."""
    curves: Curves = {row: {} for row in arguments.rows}
    for samples in arguments.samples:
        own = argparse.Namespace(
            suite=suite,
            config_dir=None if suite == "tiny" else Path(__file__).parent / suite / "configs",
            out=arguments.out / str(samples),
            overrides=[*arguments.overrides, f"calib.samples={samples}"],
        )
        session = Session(own)
        for row in arguments.rows:
            keys = {session.key(row, "task_arithmetic", "4", seed) for seed in arguments.seeds}
            if keys <= session.known.keys() or not (arguments.cached or (samples < HOLD and "refine" in row)):
                found = [session.measure(row, "task_arithmetic", "4", seed)["accuracy"] for seed in arguments.seeds]
                curves[row][samples] = statistics.median(found)
        if not arguments.cached or "experts" in session.known:
            merged = session.measure("merge, dense", "task_arithmetic", "4", arguments.seeds[0])["accuracy"]
            ends = {"experts": session.known["experts"]["accuracy"], "merge": merged}
    return curves, ends


def table(suite: str, curves: Curves, ends: dict[str, float], samples: list[int]) -> None:
    """Prints a Markdown table."""
    print(f"\n| {suite} | " + " | ".join(map(str, samples)) + " |\n|---" + "|---" * len(samples) + "|")
    for row, points in curves.items():
        cells = [f"{points[count]:.1f}" if count in points else "" for count in samples]
        print(f"| {ROWS.get(row, row)} | " + " | ".join(cells) + " |")
    print(f"\nexperts {ends['experts']:.1f}, merge {ends['merge']:.1f}", flush=True)


def draw(found: dict[str, tuple[Curves, dict[str, float]]], path: Path) -> None:
    """Draws one panel for each suite."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "epmq", "font.family": "sans-serif"}
    figure, axes = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.8), squeeze=False, layout="constrained")
    for axis, (suite, (curves, ends)) in zip(axes[0], found.items(), strict=True):
        for (row, points), marker in zip(curves.items(), "osv^D", strict=False):
            axis.plot([*points], [*points.values()], marker=marker, markersize=4, label=ROWS.get(row, row))
        for name, style in (("experts", "--"), ("merge", ":")):
            axis.axhline(ends[name], color="dimgray", linestyle=style, linewidth=1)
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8}
            axis.annotate(name, (0.01, ends[name]), (2, 2), color="dimgray", **place)
        axis.set(xscale="log", title=suite, xlabel="calibration samples a task", ylabel=METRICS.get(suite, ACCURACY))
        ticks = sorted({count for points in curves.values() for count in points})
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parses the command line, prints the tables and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=["tiny"])
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/samples"))
    parser.add_argument("--figure", type=Path, default=Path("docs/samples.svg"))
    parser.add_argument("--cached", action="store_true", help="measure nothing; draw the results under --out")
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of every run")
    arguments = parser.parse_args()
    quiet_libraries()
    found = {}
    with torch.no_grad():  # not inference_mode: refinement trains the model
        for suite in arguments.suites:
            found[suite] = measure(suite, arguments)
            table(suite, *found[suite], arguments.samples)
    draw(found, arguments.figure)


if __name__ == "__main__":
    main()
