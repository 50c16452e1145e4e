"""Oracle: run folders made by hand, and the order of their averages."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from epmq_cli.report import sweep_table
from epmq_cli.report.comparison import LEGEND
from epmq_cli.report.sweep_table import SweepTable
from tests.helpers.reports import content, write_run


def config(folder: Path) -> DictConfig:
    return OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})


def test_the_best_job_of_a_sweep_is_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bits, score in ((2, 0.4), (3, 0.8), (4, 0.6)):
        found = content({"a": (0.1, 0.5, score, 0.9)}, overrides=[f"bits={bits}"])
        write_run(tmp_path / f"bits={bits}", found)
    SweepTable().on_multirun_end(config(tmp_path))
    with (tmp_path / "results.csv").open() as file:
        assert [row["bits"] for row in csv.DictReader(file)] == ["3", "4", "2"]
    assert len(json.loads((tmp_path / "results.json").read_text())) == 3
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["bits", "3", "4", "2"]


def test_rows_within_the_noise_of_the_best_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bits, score in ((2, 0.4), (3, 0.8), (4, 0.79)):
        found = content({"a": (0.1, 0.5, score, 0.9)}, error=0.03, overrides=[f"bits={bits}"])
        write_run(tmp_path / f"bits={bits}", found)
    SweepTable().on_multirun_end(config(tmp_path))
    with (tmp_path / "results.csv").open() as file:
        assert [row["within noise"] for row in csv.DictReader(file)] == ["yes", "yes", "no"]
    printed = capsys.readouterr().out
    assert [line.split()[:4] for line in printed.splitlines()[1:3]] == [
        ["3", "80.0", "80.0", "75"],
        ["4", "79.0", "\u2248", "79.0"],
    ]
    assert " ".join(printed.split()).endswith(LEGEND)


def test_one_job_needs_no_table(tmp_path: Path) -> None:
    write_run(tmp_path / "bits=2", content({"a": (0.1, 0.5, 0.4, 0.9)}))
    SweepTable().on_multirun_end(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["bits=2"]


def test_a_table_that_cannot_be_made_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(runs: object) -> None:
        raise ValueError("no such number")

    for bits in (2, 3):
        write_run(tmp_path / f"bits={bits}", content({"a": (0.1, 0.5, 0.4, 0.9)}, overrides=[f"bits={bits}"]))
    monkeypatch.setattr(sweep_table, "compared", fails)
    with caplog.at_level(logging.WARNING, logger="epmq"):
        SweepTable().on_multirun_end(config(tmp_path))
    assert f"the table of the sweep was not written (no such number); epmq report {tmp_path}" in caplog.text
