"""Oracles: small tables worked out by hand; the clock and the memory of this process."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from epmq_cli.evaluate.metrics import Score
from epmq_cli.report.metrics_json import by_task, write_json
from epmq_cli.report.stage_timer import Stages
from epmq_cli.report.table import counted, score_table, show_merge, show_run

FINE = {"fallbacks": 0, "unrouted": 0, "target_without_factor": 0}
HALVED = {"batches_halved": 2, "eval_batches_halved": 0}
SCORES = {"base": {"a": Score(0.5, 0.03, 9), "b": Score(0.25, 0.04, 7)}, "experts": {"a": Score(1.0)}}


def test_scores_are_grouped_by_task_and_averaged_by_stage() -> None:
    found = by_task(SCORES, {"a": "accuracy", "b": "accuracy"})
    assert found["tasks"] == {"a": {"base": 0.5, "experts": 1.0}, "b": {"base": 0.25}}
    assert found["average"] == {"base": 0.375, "experts": 1.0}


def test_standard_errors_are_left_out_where_they_are_not_known() -> None:
    """The error of the mean of two tasks with 3 and 4 % is 2.5 %; of a geometric mean, relative errors count."""
    found = by_task(SCORES, {"a": "accuracy", "b": "accuracy"})
    assert found["samples"] == {"a": 9, "b": 7}
    assert found["standard_errors"] == {
        "tasks": {"a": {"base": 0.03}, "b": {"base": 0.04}},
        "average": {"base": pytest.approx(0.025)},
    }
    kinds = {"a": "perplexity", "b": "perplexity"}
    assert by_task(SCORES | {"merged": {"a": Score(2.0, 0.1), "b": Score(8.0)}}, kinds)["standard_errors"][
        "average"
    ] == {"base": pytest.approx(math.sqrt(0.125) * math.hypot(0.03 / 0.5, 0.04 / 0.25) / 2)}


def test_perplexities_are_averaged_as_losses_and_shown_unscaled() -> None:
    found = by_task({"base": {"a": Score(2.0), "b": Score(8.0)}}, {"a": "perplexity", "b": "perplexity"})
    assert found["average"] == {"base": pytest.approx(4)}
    columns = {column.header: list(column.cells) for column in score_table(found).columns}
    assert columns == {"perplexity": ["a", "b", "average"], "base": ["2.00", "8.00", "4.00"]}


def test_tasks_with_different_metrics_name_them() -> None:
    found = by_task(SCORES, {"a": "accuracy", "b": "spearman"})
    columns = {column.header: list(column.cells) for column in score_table(found).columns}
    assert columns["score in %"] == ["a (accuracy)", "b (spearman)", "average", "standard error"]


def test_the_table_has_a_row_per_task_one_for_the_mean_and_one_for_its_error() -> None:
    table = score_table(by_task(SCORES, {"a": "accuracy", "b": "accuracy"}))
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns == {
        "accuracy in %": ["a", "b", "average", "standard error"],
        "base": ["50.0", "25.0", "37.5", "2.5"],
        "experts": ["100.0", "", "100.0", ""],
    }


def test_stages_initialize_the_gpu_before_they_read_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA cannot reset memory statistics before it is initialized."""
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: called.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: called.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    stages = Stages(torch.device("cuda", 0))
    with stages.stage("read"):
        pass
    assert called == ["init", "reset"]
    assert stages.records["read"]["peak_device_bytes"] == 7


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


def test_json_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_the_summary_reports_tuning_cache_and_mixed_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {
        "scores": by_task({}, {}),
        "bytes": {"model_dense": 8e6, "model_packed": 2e6, "linears_dense": 4e6, "linears_packed": 1e6},
        "events": {"linears": 1, "damping_retried": 1, **FINE, **HALVED},
        "stages": {"walk": {"seconds": 1.0}},
        "guidance": {"lam": 0.003, "beta": 1.0, "chosen": ["lam", "beta"], "trials": [{}] * 9},
        "average_bits": 3.4792,
        "cache": {"found": 16, "made": 1},
    }
    show_run(measured, "title", tmp_path)
    printed = capsys.readouterr().out
    assert "chosen      lam 0.003, beta 1, of 9 tried without labels\n" in printed
    assert "8.00 MB -> 2.00 MB, calibrated linears 4.0 times smaller at 3.48 bits on average\n" in printed
    assert "trouble     of 1 linears 1 needed more damping; see layers in metrics.json\n" in printed
    assert "cache       reused 16 results of earlier runs; cache=false recomputes them\n" in printed
    assert "memory      ran out: the micro-batch was halved in calibration 2 times\n" in printed
    measured["guidance"] = {"chosen": []}
    measured["cache"] = None
    measured["average_bits"] = 4.0
    show_run(measured, "title", tmp_path)
    printed = capsys.readouterr().out
    assert "tried without labels" not in printed
    assert "cache" not in printed
    assert "4.0 times smaller\n" in printed


def test_the_summary_of_a_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"read": {"seconds": 1.0}, "merge": {"seconds": 2.0}}
    show_merge({"bytes": {"model_dense": 8e6}, "stages": stages}, tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "weights     8.00 MB",
        "time        3.0 s: read 1.0 s, merge 2.0 s",
        f"checkpoint  {tmp_path / 'checkpoint'}",
        f"metrics     {tmp_path / 'metrics.json'}",
    ]
    assert (counted(1, "expert"), counted(2, "expert")) == ("1 expert", "2 experts")
