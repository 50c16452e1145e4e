"""Oracles: a second process, and the files that a killed one leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from epmq_cli.errors import ConfigError, RunError
from epmq_cli.store.run_lock import FOLDER, LOCK, alone, in_use, refuse_used, remove
from tests.faults.driver import forked, kill


def test_a_folder_is_one_processes_until_that_ends(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(RunError, match=r"is in use by another run; wait for that to end, or choose another out"):
            alone(tmp_path).__enter__()
        assert in_use(tmp_path)

    with alone(tmp_path):
        assert forked(second) == 0
    assert not in_use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    def first() -> None:
        with alone(tmp_path):
            kill()

    assert forked(first) == -9
    assert not in_use(tmp_path)
    with alone(tmp_path):
        pass


def test_what_killed_processes_left_is_cleared_and_the_rest_kept(tmp_path: Path) -> None:
    left = [
        ".checkpoint.partial/x",
        ".metrics.json.partial",
        ".activations-1/2",
        ".student-a",
        f"{FOLDER}/k/.v.partial",
    ]
    kept = ["run.log", ".hydra/config.yaml", f"{FOLDER}/k/v"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with alone(tmp_path):
        pass
    assert not [name for name in left if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in kept)


def test_results_are_refused_by_name(tmp_path: Path) -> None:
    refuse_used(tmp_path, "checkpoint")
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ConfigError, match="already holds checkpoint; choose another out or remove them"):
        refuse_used(tmp_path, "checkpoint", "metrics.json")


def test_a_folder_of_state_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / FOLDER).symlink_to("elsewhere")
    with pytest.raises(RunError, match=f"/{FOLDER} is a link to elsewhere; remove it, or choose another out"):
        alone(tmp_path).__enter__()


def test_what_is_removed_of_a_link_is_the_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    remove(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    os.mkfifo(tmp_path / FOLDER / LOCK)

    def body() -> None:
        assert not in_use(tmp_path)
        with pytest.raises(RunError, match="/lock is no file; remove it, or choose another out"):
            alone(tmp_path).__enter__()

    signal.alarm(10)  # ends both processes where one waits
    assert forked(body) == 0
    signal.alarm(0)
