"""Oracles: small tables worked out by hand; the clock and the memory of this process."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from epmq_cli.report.metrics import by_task, write_json
from epmq_cli.report.stages import Stages
from epmq_cli.report.table import score_table

SCORES = {"base": {"a": 0.5, "b": 0.25}, "experts": {"a": 1.0}}


def test_scores_are_turned_to_tasks_and_averaged_by_stage() -> None:
    found = by_task(SCORES)
    assert found["tasks"] == {"a": {"base": 0.5, "experts": 1.0}, "b": {"base": 0.25}}
    assert found["average"] == {"base": 0.375, "experts": 1.0}


def test_table_has_a_row_a_task_and_one_for_the_mean() -> None:
    table = score_table(by_task(SCORES))
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns == {
        "accuracy in %": ["a", "b", "average"],
        "base": ["50.0", "25.0", "37.5"],
        "experts": ["100.0", "", "100.0"],
    }


def test_stages_measure_time_and_the_peak_of_each_stage_alone() -> None:
    stages = Stages(torch.device("cpu"))
    with stages.stage("large"):
        block = torch.ones(40_000_000)  # 160 MB
        time.sleep(0.05)
        del block
    with stages.stage("small"):
        pass
    assert stages.records["large"]["seconds"] >= 0.05
    assert stages.records["small"]["seconds"] < stages.records["large"]["seconds"]
    assert stages.records["large"]["peak_device_bytes"] is None
    assert stages.records["large"]["peak_host_bytes"] > 160_000_000
    assert stages.records["small"]["peak_host_bytes"] <= stages.records["large"]["peak_host_bytes"]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
