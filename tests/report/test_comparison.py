"""Oracle: two or three runs with numbers worked out by hand, and the tables that they must give."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from epmq_cli.report.comparison import LEGEND, Column, Comparison, compared, pareto, swept
from epmq_cli.report.page.comparison import apart
from epmq_cli.report.run_folders import Run
from epmq_cli.report.table_formats import as_csv, as_json, as_latex, as_markdown, terminal_table
from tests.helpers.reports import content

SHARES = (0.8, 0.76, 0.757, 0.7)


@pytest.fixture
def comparison() -> Comparison:
    low = content({"a_b": (0.1, 0.5, 0.7, 0.9)}, overrides=["merge=ties", "out=x", "seed=1"])
    high = content({"a_b": (0.1, 0.5, 0.8, 0.9)}, overrides=["++merge=average", "seed=1"])
    return compared([Run(Path("/r/low"), low), Run(Path("/r/high"), high)])


def test_the_table_as_csv(comparison: Comparison) -> None:
    assert as_csv(comparison) == (
        "merge,a_b,average,gap closed in %,bits a weight,MB,seconds,folder\n"
        "ties,70,70,50,4,2.5,4,/r/low\n"
        "average,80,80,75,4,2.5,4,/r/high\n"
    )


def test_the_table_as_markdown(comparison: Comparison) -> None:
    assert as_markdown(comparison) == (
        "| merge | a\\_b | average | gap closed in % | bits a weight | MB | seconds |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| ties | 70.0 | 70.0 | 50 | 4.00 | 2.50 | 4.0 |\n"
        "| average | 80.0 | 80.0 | 75 | 4.00 | 2.50 | 4.0 |\n"
    )


def test_the_table_as_latex(comparison: Comparison) -> None:
    """The best score is bold, the second underlined; sizes and times are neither."""
    assert as_latex(comparison).splitlines() == [
        r"\begin{tabular}{lrrrrrr}",
        r"\toprule",
        r"merge & a\_b & average & gap closed in \% & bits a weight & MB & seconds \\",
        r"\midrule",
        r"ties & \underline{70.0} & \underline{70.0} & \underline{50} & 4.00 & 2.50 & 4.0 \\",
        r"average & \textbf{80.0} & \textbf{80.0} & \textbf{75} & 4.00 & 2.50 & 4.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_the_table_as_json(comparison: Comparison) -> None:
    first = json.loads(as_json(comparison))[0]
    assert (first["folder"], first["settings"]) == ("/r/low", {"merge": "ties"})
    assert first["numbers"]["average"] == pytest.approx(70)


@pytest.mark.parametrize(("width", "tasks"), [(120, True), (70, False)])
def test_the_table_of_the_terminal_leaves_out_tasks_that_do_not_fit(
    width: int, tasks: bool, comparison: Comparison
) -> None:
    shown = io.StringIO()
    console = Console(width=width, file=shown)
    table, complete = terminal_table(comparison, width)
    console.print(table)
    head, low, high = (line.split() for line in shown.getvalue().splitlines())
    assert (complete, "a_b" in head) == (tasks, tasks)
    assert low == ["ties", *["70.0"] * (1 + tasks), "50", "4.00", "2.50", "4.0"]
    assert high[0] == "average"


def test_runs_without_scores_or_differences_are_rows_too() -> None:
    bare = {"command": "merge", "overrides": [], "config": {}, "stages": {}, "environment": {}}
    found = compared([Run(Path("/r/one"), bare), Run(Path("/r/two"), bare)])
    assert as_csv(found).splitlines()[1] == "one,,,,,0,/r/one"


@pytest.fixture
def noisy() -> Comparison:
    """Averages of 80, 76, 75.7 and 70 with errors of 3, so that differences up to 4.24 are noise."""
    runs = [content({"a": (0.1, 0.5, score, 0.9)}, error=0.03, overrides=[f"seed={score}"]) for score in SHARES]
    return compared([Run(Path("/r"), run) for run in runs])


def test_averages_within_the_noise_of_the_best_are_marked(noisy: Comparison) -> None:
    average = noisy.column("average")
    assert [noisy.cell(average, row) for row in range(4)] == ["80.0", "\u2248 76.0", "75.7", "70.0"]
    assert [line.split(",")[-3:-1] for line in as_csv(noisy).splitlines()[:3]] == [
        ["standard error", "within noise"],
        ["3", "yes"],
        ["3", "yes"],
    ]
    assert [row["within_noise"] for row in json.loads(as_json(noisy))] == [True, True, False, False]
    assert as_markdown(noisy).endswith(f"\n\n{LEGEND}\n")
    assert r"& $\approx$ \underline{76.0} &" in as_latex(noisy)
    assert as_latex(noisy).splitlines()[-1] == f"% {LEGEND}"


def test_only_the_same_samples_are_compared(noisy: Comparison) -> None:
    """The other run has another number of samples, or none, as in files of earlier versions."""
    best = Run(Path("/r/best"), content({"a": (0.1, 0.5, 0.8, 0.9)}, error=0.03))
    for error, samples in ((0.03, 99), (None, None)):
        other = content({"a": (0.1, 0.5, 0.79, 0.9)}, error=error)
        if samples:
            other["scores"]["samples"]["a"] = samples
        found = compared([best, Run(Path("/r/other"), other)])
        assert (found.near, found.legend) == ((True, False), "")
        assert compared([Run(Path("/r/other"), other)]).legend == ""
    old = compared([Run(Path("/r/other"), content({"a": (0.1, 0.5, 0.79, 0.9)}))])
    assert (old.near, "within noise" in as_csv(old)) == ((), False)


def test_of_perplexities_the_smallest_is_the_best() -> None:
    column = Column("x", (3.0, None, 2.0, 2.001), 2, -1)
    assert (column.ranked(0), column.ranked(1)) == ("2.00", "3.00")
    assert Column("x", (3.0, None), 2, 1).ranked(0) is None
    assert Column("x", (3.0, 2.0), 2, 0).ranked(0) is None


def test_the_front_of_runs_that_none_beats() -> None:
    points = [(1.0, 5.0), (2.0, 7.0), (2.0, 6.0), (3.0, 7.0), (4.0, 8.0)]
    assert pareto(points, 1) == [0, 1, 4]
    assert pareto(points, -1) == [0]


def test_swept_numbers_and_labels_that_do_not_overlap(comparison: Comparison) -> None:
    several = Comparison(("", ""), {"a": ("1", "2e-3"), "b": ("1", "x")}, comparison.columns, "accuracy")
    assert swept(several) == ["a"]
    assert swept(comparison) == []
    assert apart([1.0, 1.0, 5.0], 2) == [1.0, 3.0, 5.0]


def test_numbers_that_round_to_zero_have_no_sign() -> None:
    column = Column("gap", (-0.2, 0.2, -0.6, None), 0)
    assert [column.shown(row) for row in range(4)] == ["0", "0", "-1", ""]
