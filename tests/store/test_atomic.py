"""Oracle: the folder before or after a write, never anything between."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from epmq_cli.runtime import signals
from epmq_cli.store import atomic
from epmq_cli.store.atomic import whole_file, write_text


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_on_disk_before_and_behind_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "file", []
    monkeypatch.setattr(atomic, "sync", lambda found: synced.append((found.name, path.exists())))
    write_text(path, "text")
    assert synced == [(".file.partial", False), (tmp_path.name, True)]


def test_a_signal_waits_for_the_end_of_a_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with (
        pytest.raises(signals.Interrupted) as stopped,
        signals.handle_signals(lambda: None),
        whole_file(path) as partial,
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        partial.write_text("new")
    assert stopped.value.number == signal.SIGTERM
    assert path.read_text() == "new"
