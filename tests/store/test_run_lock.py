"""Oracles: a second process, and the files that a killed one leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from epmq_cli.errors import ConfigError, RunError
from epmq_cli.store.run_lock import FOLDER, LOCK, exclusive_lock, in_use, refuse_used, remove
from tests.faults.driver import forked, kill


def test_a_folder_belongs_to_one_process_until_that_ends(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(RunError, match=r"another run is using out=.*; wait until it ends, or choose another out"):
            exclusive_lock(tmp_path).__enter__()
        assert in_use(tmp_path)

    with exclusive_lock(tmp_path):
        assert forked(second) == 0
    assert not in_use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    def first() -> None:
        with exclusive_lock(tmp_path):
            kill()

    assert forked(first) == -9
    assert not in_use(tmp_path)
    with exclusive_lock(tmp_path):
        pass


def test_files_of_killed_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
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
    with exclusive_lock(tmp_path):
        pass
    assert not [name for name in left if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in kept)


def test_results_are_refused_by_name(tmp_path: Path) -> None:
    refuse_used(tmp_path, "checkpoint")
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ConfigError, match="already holds checkpoint; choose another out or remove them"):
        refuse_used(tmp_path, "checkpoint", "metrics.json")


def test_a_progress_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / FOLDER).symlink_to("elsewhere")
    with pytest.raises(RunError, match=f"/{FOLDER} is a link to another place; remove it, or choose another out"):
        exclusive_lock(tmp_path).__enter__()


def test_removing_a_link_keeps_its_target(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    remove(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_pipe_in_place_of_the_lock_does_not_block(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    os.mkfifo(tmp_path / FOLDER / LOCK)

    def body() -> None:
        assert not in_use(tmp_path)
        with pytest.raises(RunError, match="/lock is not a regular file; remove it, or choose another out"):
            exclusive_lock(tmp_path).__enter__()

    signal.alarm(10)  # ends both processes if one blocks
    assert forked(body) == 0
    signal.alarm(0)
