"""Oracle: hashlib on the files. A file is read again when it changed, and only then."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from epmq_cli.store import cache
from epmq_cli.store.cache import FileHashes


def old(path: Path, content: bytes) -> Path:
    """A file that was written an hour ago. Only the change time of its inode, which cannot be set, is newer."""
    path.write_bytes(content)
    hour = path.stat().st_mtime_ns - 3600 * 10**9
    os.utime(path, ns=(hour, hour))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read completely, in order."""
    found: list[Path] = []
    real = cache.content

    def content(path: Path) -> Any:
        found.append(path)
        return real(path)

    monkeypatch.setattr(cache, "content", content)
    return found


def test_a_file_is_read_once_and_again_after_a_change(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SETTLED", 0)
    path = old(tmp_path / "model.safetensors", b"one")
    for _ in range(3):  # three jobs
        assert FileHashes(tmp_path / "known").file(path) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 1
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size and modification time as before
    assert FileHashes(tmp_path / "known").file(path) == hashlib.sha256(b"two").hexdigest()
    assert len(reads) == 2


def test_a_hash_of_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    path = old(tmp_path / "model.safetensors", b"one")
    for _ in range(2):
        FileHashes(tmp_path / "known").file(path)
    assert len(reads) == 2
    assert not (tmp_path / "known").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"state": 1}', "{" * 5000])
def test_a_damaged_memory_is_replaced(
    content: str, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SETTLED", 0)
    path = old(tmp_path / "model.safetensors", b"one")
    FileHashes(tmp_path / "known").file(path)
    (memory,) = (tmp_path / "known").iterdir()
    memory.write_text(content)
    for _ in range(2):
        assert FileHashes(tmp_path / "known").file(path) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 2


def test_files_are_hashed_by_name(tmp_path: Path, reads: list[Path]) -> None:
    paths = {name: old(tmp_path / name, name.encode()) for name in ("one", "two")}
    assert FileHashes(None).files(paths) == {name: hashlib.sha256(name.encode()).hexdigest() for name in paths}
    assert sorted(reads) == sorted(paths.values())
    assert sorted(tmp_path.iterdir()) == sorted(paths.values()), "without a folder nothing is remembered"
