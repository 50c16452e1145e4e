"""Oracle: two or three runs with numbers worked out by hand, and the tables that they must give."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from epmq_cli.report.comparison import Column, Comparison, compared, pareto, swept
from epmq_cli.report.page.comparison import apart
from epmq_cli.report.run_folders import Run
from epmq_cli.report.table_formats import as_csv, as_json, as_latex, as_markdown, terminal_table
from tests.helpers.reports import content


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
