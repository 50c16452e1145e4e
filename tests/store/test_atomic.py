"""Oracle: the folder before or after a write, nothing in between."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from epmq_cli.runtime.signals import Interrupted, as_exceptions
from epmq_cli.store import atomic
from epmq_cli.store.atomic import atomic_file, atomic_folder, write_text
from tests.faults.driver import forked


def test_a_file_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "file", []
    monkeypatch.setattr(atomic, "sync", lambda found: synced.append((found.name, path.exists())))
    write_text(path, "text")
    assert synced == [(".file.partial", False), (tmp_path.name, True)]


def test_a_signal_keeps_the_old_file(tmp_path: Path) -> None:
    def body() -> None:
        with pytest.raises(Interrupted), as_exceptions(lambda: None), atomic_file(path) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    path = tmp_path / "file"
    write_text(path, "old")
    assert forked(body) == 0
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_a_shared_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path, shared=True) as one, atomic_file(path, shared=True) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one", "its block ends last"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    with pytest.raises(ZeroDivisionError), atomic_folder(path) as partial:
        (partial / "file").write_text("half")
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []
    (path.parent / ".folder.partial").mkdir()
    (path.parent / ".folder.partial" / "left").write_text("by a killed process")
    with atomic_folder(path) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("whole")
        assert not path.exists()
    assert [inner.name for inner in path.iterdir()] == ["inner"]
    assert list(path.parent.iterdir()) == [path]
