"""Oracle: folders made by hand; the jobs of a sweep are counted as Hydra makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from epmq_cli.report.run_folders import planned, read, time_left
from epmq_cli.store.run_lock import exclusive_lock
from tests.helpers.reports import content, write_run

ONE = content({"a": (0.1, 0.5, 0.8, 0.9)})


def test_runs_of_folders_and_a_sentence_for_each_other_folder(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", ONE)
    (tmp_path / "begun" / ".hydra").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "broken", {"config": 3})
    names = ("whole", "whole", "begun", "empty", "broken", "none")
    found = read([tmp_path / name for name in names])
    assert [run.folder for run in found.runs] == [whole]
    assert [note.removeprefix(f"{tmp_path}/") for note in found.notes] == [
        "begun was started and not finished; start the same command again to continue it",
        "empty has no metrics.json and no runs in it; give the folder of a run or a sweep",
        f"broken/metrics.json is not what epmq wrote; remove {tmp_path / 'broken'} and run it again",
        "none is not a folder; give the folder of a run or a sweep",
    ]


def test_a_sweep_shows_what_is_finished_and_how_long_the_rest_takes(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text("hydra: {overrides: {task: ['merge=ties,average', 'bits=2,3', 'seed=1']}}")
    write_run(tmp_path / "bits=2,merge=ties", ONE)
    (tmp_path / "bits=2,merge=average" / ".hydra").mkdir(parents=True)
    with exclusive_lock(tmp_path / "bits=2,merge=average"):
        found = read([tmp_path])
    assert len(found.runs) == 1
    (note,) = found.notes
    assert note.startswith(f"{tmp_path}: 1 of 4 jobs finished, 1 running, about ")
    assert note.endswith(" s left")


def test_the_time_left_is_the_mean_of_the_finished_jobs() -> None:
    assert time_left([], 3, [1.0]) is None
    assert time_left([10.0, 20.0], 4, []) == 60
    assert time_left([10.0, 20.0], 4, [5.0, 100.0]) == (60 - 5 - 15) / 2


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [("['a=1,2', 'b=range(0,3)', 'c=[1,2]']", 6), ("['merge=glob(*)']", None), ("[]", 1), ("{", None), ("[3]", None)],
)
def test_the_jobs_that_a_sweep_plans(overrides: str, jobs: int | None, tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text(f"hydra: {{overrides: {{task: {overrides}}}}}")
    assert planned(tmp_path / "multirun.yaml") == jobs
