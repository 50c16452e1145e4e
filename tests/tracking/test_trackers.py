"""Oracles: the trackers' own readers of their stores, and the metrics.json of the run."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from epmq_cli.tracking.mlflow import Mlflow
from epmq_cli.tracking.tracker import RunRecord, Tracker, run_record
from epmq_cli.tracking.trackio import Trackio
from epmq_cli.tracking.wandb import Wandb

CONTENT = {
    "config": {
        "bits": 4,
        "merge": {"scale": 0.3, "weights": None},
        "suite": {"tasks": {"<b>/../x": {"classes": ["a"]}}},
    },
    "scores": {
        "tasks": {"<b>/../x": {"merged": 0.5, "quantized": 0.75}},
        "average": {"merged": 0.5, "quantized": 0.75},
        "samples": {"<b>/../x": 100},
        "standard_errors": {"tasks": {"<b>/../x": {"merged": 0.05}}, "average": {"merged": 0.05}},
    },
    "stages": {"read": {"seconds": 1.5, "peak_host_bytes": 2_000_000, "peak_device_bytes": None}},
    "bytes": {"model_packed": 10},
    "average_bits": 4.0,
}
PARAMS = {"bits": "4", "merge.scale": "0.3", "merge.weights": "null", "suite.tasks._b__.._x.classes": '["a"]'}
METRICS = {
    "score/_b__.._x/merged": 0.5,
    "score/_b__.._x/quantized": 0.75,
    "score/average/merged": 0.5,
    "score/average/quantized": 0.75,
    "standard_error/_b__.._x/merged": 0.05,
    "standard_error/average/merged": 0.05,
    "samples/_b__.._x": 100.0,
    "seconds/read": 1.5,
    "peak_host_mb/read": 2.0,
    "bytes/model_packed": 10.0,
    "average_bits": 4.0,
}
DONE = JobReturn(status=JobStatus.COMPLETED)


class Fake(Tracker):
    package = "fake"

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.runs: list[RunRecord] = []
        self.error = error

    def record(self, run: RunRecord) -> None:
        if self.error:
            raise self.error
        self.runs.append(run)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """The config of a job whose run folder has results and a report."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(CONTENT))
    (folder / "report.html").write_text("<p>report")
    return OmegaConf.create({"hydra": {"runtime": {"output_dir": str(folder)}}})


def test_a_complete_run_is_recorded_with_names_that_trackers_take(config: Any, tmp_path: Path) -> None:
    run = run_record(config, 0)
    assert run is not None
    assert (run.name, run.params, run.metrics) == ("run", PARAMS, METRICS)
    assert run.artifacts == (tmp_path / "run" / "report.html",)
    (tmp_path / "run" / "report.html").unlink()
    assert run_record(config, 0).artifacts == ()  # type: ignore[union-attr]


def test_jobs_that_fail_or_were_complete_before_are_not_recorded(config: Any, tmp_path: Path) -> None:
    tracker = Fake()
    tracker.on_job_start(config)
    tracker.on_job_end(config, JobReturn(status=JobStatus.FAILED))
    assert tracker.runs == []
    tracker.on_job_end(config, DONE)
    assert len(tracker.runs) == 1
    os.utime(tmp_path / "run" / "metrics.json", (0, 0))
    tracker.on_job_end(config, DONE)
    (tmp_path / "run" / "metrics.json").unlink()
    tracker.on_job_end(config, DONE)
    assert len(tracker.runs) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no\nroom"), "tracking=fake failed, so the run is not recorded: no"),
        (
            ImportError("fake"),
            "tracking=fake needs the package fake, so the run is not recorded; get it with pip install",
        ),
    ],
)
def test_a_failure_is_a_warning(error: Exception, said: str, config: Any, caplog: pytest.LogCaptureFixture) -> None:
    Fake(error).on_job_end(config, DONE)
    (line,) = caplog.messages
    assert line.startswith(said)


@pytest.fixture
def recorded(tmp_path: Path) -> RunRecord:
    report = tmp_path / "report.html"
    report.write_text("<p>report")
    params = {**PARAMS, **{f"many.{number}": str(number) for number in range(150)}}
    return RunRecord("run", params, METRICS, (report,), 1_700_000_000.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_stores_runs_in_a_local_database(
    recorded: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for _ in range(2):
        Mlflow(uri, "epmq").record(recorded)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("epmq").experiment_id
    runs = client.search_runs([experiment])
    assert len(runs) == 2
    for run in runs:
        assert (run.info.run_name, run.info.status, run.info.end_time) == ("run", "FINISHED", 1_700_000_000_000)
        assert (run.data.params, run.data.metrics) == (recorded.params, METRICS)
        assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["report.html"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trackio_stores_runs_in_a_local_database(
    recorded: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip("trackio", reason="needs the extra trackio")
    Trackio("epmq").record(recorded)
    assert capsys.readouterr().out == ""
    with sqlite3.connect(tmp_path / "store" / "epmq.db") as database:
        (logged,) = [
            json.loads(row[0]) for row in database.execute("select metrics from metrics where run_name = 'run'")
        ]
        (stored,) = [json.loads(row[0]) for row in database.execute("select config from configs")]
    assert {name: logged[name] for name in METRICS} == METRICS
    assert {name: stored[name] for name in recorded.params} == recorded.params


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_stores_runs_offline(recorded: RunRecord, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    Wandb("epmq", str(tmp_path), "offline").record(recorded)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (stored,) = folder.glob("*.wandb")
    wanted, end = {*METRICS, *PARAMS, "report.html"}, time.monotonic() + 20
    while wanted and time.monotonic() < end:  # another process writes the file
        time.sleep(0.1)
        content = stored.read_bytes()
        wanted = {text for text in wanted if text.encode() not in content}
    assert wanted == set()
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_run_of_the_command_is_tracked(clip_hub: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from tests.faults.driver import command, mini

    arguments = mini(clip_hub, "calib.samples=8", "eval.stages=[quantized]", "out=run", "tracking=mlflow")
    status, said = command(tmp_path, *arguments)
    assert status == 0, said
    wanted = json.loads((tmp_path / "run" / "metrics.json").read_text())
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        metrics = dict(database.execute("select key, value from metrics"))
    assert metrics["score/average/quantized"] == wanted["scores"]["average"]["quantized"]
    assert "tracking" not in json.loads((tmp_path / "run" / "checkpoint" / "epmq.json").read_text())["choices"]
