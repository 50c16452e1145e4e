"""Oracle: the folder in which a command continues, given folders of earlier runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.errors import RunError
from epmq_cli.pipeline import unfinished
from epmq_cli.pipeline.unfinished import RUNS, VARIABLE, begin, continued, end, typed
from epmq_cli.store.run_lock import RESULTS, exclusive_lock


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "")  # restored after the test


def started(name: str, *arguments: str) -> Path:
    """The folder of a run that was started with these arguments and is not complete."""
    folder = RUNS / name
    folder.mkdir(parents=True)
    continued(arguments)
    begin(folder)
    return folder


def test_the_last_unfinished_folder_with_the_same_arguments_is_used() -> None:
    started("1", "bits=3")
    started("2", "bits=3")
    started("3", "bits=4")
    assert continued(["bits=3"]) == ["out=runs/2", "bits=3"]
    assert continued(["bits=2"]) == ["bits=2"]
    assert typed(["bits=3", "out=runs/2"]) == ["bits=3"]


@pytest.mark.parametrize("argument", ["resume=never", "out=mine", "hydra.run.dir=mine", "--cfg", "-sc"])
def test_no_folder_is_used_if_the_arguments_set_one(argument: str) -> None:
    started("1", "bits=3")
    assert continued(["bits=3", argument]) == ["bits=3", argument]


def test_a_folder_in_use_or_complete_is_not_used() -> None:
    folder = started("1", "bits=3")
    with exclusive_lock(folder):
        assert continued(["bits=3"]) == ["bits=3"]
    assert continued(["bits=3"]) == ["out=runs/1", "bits=3"]
    for name in RESULTS:
        (folder / name).touch()
    assert continued(["bits=3"]) == ["bits=3"]


def test_a_finished_command_leaves_no_mark() -> None:
    folder, other = started("1", "bits=3"), started("2", "bits=4")
    continued(["bits=3"])
    end(["bits=3"])
    assert not (folder / unfinished.MARK).exists()
    assert (other / unfinished.MARK).exists()


def test_the_default_folder_is_searched() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert Path(compose("run").out).parent == RUNS


def test_marks_that_cannot_be_read_are_ignored() -> None:
    started("1", "bits=3")
    (started("2", "bits=3") / unfinished.MARK).write_bytes(b"\xff\xfe")
    folder = started("3", "bits=3")
    (folder / unfinished.MARK).unlink()
    os.mkfifo(folder / unfinished.MARK)
    assert continued(["bits=3"]) == ["out=runs/1", "bits=3"]


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"config": null}', b"\xff", b"[" * 100_000], ids=range(6))
def test_a_job_with_damaged_results_is_named(content: bytes) -> None:
    folder = RUNS / "job"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "metrics.json").write_bytes(content)
    message = r"runs/job/metrics.json is corrupted; remove runs/job and start the same command again"
    with pytest.raises(RunError, match=message):
        unfinished.done(folder, DictConfig({"bits": 4}))
    (folder / "metrics.json").unlink()
    os.mkfifo(folder / "metrics.json")
    with pytest.raises(RunError, match=message):
        unfinished.done(folder, DictConfig({"bits": 4}))
