"""Oracle: run folders made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.helpers.reports import content, write_run

pytestmark = pytest.mark.usefixtures("pages")


def test_report_prints_the_table_and_writes_files_and_pages(epmq_inside: Run, tmp_path: Path) -> None:
    for bits in (2, 3):
        found = content({"a": (0.1, 0.5, bits / 4, 0.9)}, overrides=[f"bits={bits}"])
        write_run(tmp_path / "sweep" / f"bits={bits}", found)
    shown = epmq_inside("report", "sweep", "none", "--html", "page.html", "--pages")
    assert shown.returncode == 0
    assert [line.split()[:2] for line in shown.stdout.splitlines()[1:]] == [["2", "50.0"], ["3", "75.0"]]
    assert shown.stderr.splitlines()[:2] == [
        f"{tmp_path / 'none'} is not a folder; give the folder of a run or a sweep",
        "wrote page.html",
    ]
    assert "<h2>Score by bits</h2>" in (tmp_path / "page.html").read_text()
    assert all("<h2>Scores</h2>" in (path / "report.html").read_text() for path in (tmp_path / "sweep").iterdir())
    assert epmq_inside("report", "sweep", "--format", "latex").stdout.startswith("\\begin{tabular}{lrrrrrr}\n")
    assert epmq_inside("report", "sweep", "--out", "table.csv").returncode == 0
    assert (tmp_path / "table.csv").read_text().startswith("bits,a,average,")


def test_report_without_a_finished_run_is_an_error(epmq_inside: Run, tmp_path: Path) -> None:
    result = epmq_inside("report", "none")
    assert result.returncode == 1
    assert result.stderr == f"epmq: {tmp_path / 'none'} is not a folder; give the folder of a run or a sweep\n"
