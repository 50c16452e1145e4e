"""Oracles: hashlib on the files; any change of a file or tensor changes its hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from epmq_cli.store import hashing
from epmq_cli.store.hashing import FileHashes, hash_parts, hash_tensors


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
    real = hashing.content

    def content(path: Path) -> Any:
        found.append(path)
        return real(path)

    monkeypatch.setattr(hashing, "content", content)
    return found


def test_a_file_is_read_once_and_again_after_a_change(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "SETTLED", 0)
    path = old(tmp_path / "model.safetensors", b"one")
    for _ in range(3):  # three jobs
        assert FileHashes(tmp_path / "known").file(path) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 1
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time of writing are as before
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
    monkeypatch.setattr(hashing, "SETTLED", 0)
    path = old(tmp_path / "model.safetensors", b"one")
    FileHashes(tmp_path / "known").file(path)
    (memory,) = (tmp_path / "known").iterdir()
    memory.write_text(content)
    for _ in range(2):
        assert FileHashes(tmp_path / "known").file(path) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 2


def test_hashes_of_tensors_depend_on_name_type_shape_and_value() -> None:
    tensors = [
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(())},
        {"a": -torch.zeros(2, 3)},
    ]
    assert len({hash_tensors(each) for each in tensors}) == len(tensors)
    assert hash_tensors({"a": torch.arange(6).view(2, 3).T}) == hash_tensors(
        {"a": torch.arange(6).view(2, 3).T.clone()}
    )


def test_the_cut_of_parts_counts() -> None:
    assert len({hash_parts(parts) for parts in ([b"ab"], [b"a", b"b"], [b"b", b"a"], [b"ab", b""])}) == 4


def test_files_are_hashed_by_name(tmp_path: Path, reads: list[Path]) -> None:
    paths = {name: old(tmp_path / name, name.encode()) for name in ("one", "two")}
    assert FileHashes(None).files(paths) == {name: hashlib.sha256(name.encode()).hexdigest() for name in paths}
    assert sorted(reads) == sorted(paths.values())
    assert sorted(tmp_path.iterdir()) == sorted(paths.values()), "without a folder nothing is remembered"
