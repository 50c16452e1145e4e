"""Oracles: the result of `make`, and the files in the folder."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from epmq_cli.store.cache import ABANDONED, Cache, cache_folder
from epmq_cli.store.safetensors_writer import Entry, of

KEY = {"kind": "score", "task": "first"}
ENTRIES = [of("a", torch.arange(6.0).view(2, 3)), of("b", torch.zeros(1, dtype=torch.bfloat16))]


def never() -> Any:
    raise AssertionError("computed although it was cached")


def test_a_value_is_computed_once_and_stays_the_same_to_the_last_bit(tmp_path: Path) -> None:
    first, second = Cache(tmp_path, 10**6), Cache(tmp_path, 10**6)
    value = {"score": 0.1 + 0.2, "list": [1, None, "ü"]}
    assert first.value(KEY, lambda: value) == value
    assert second.value({"task": "first", "kind": "score"}, never) == value  # the order of parts does not matter
    assert (first.found, first.made, second.found, second.made) == (0, 1, 1, 0)


@pytest.mark.parametrize("other", [{**KEY, "task": "second"}, {**KEY, "more": None}, {"kind": "score"}])
def test_another_key_is_another_entry(other: dict[str, Any], tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    cache.value(KEY, lambda: 1)
    assert cache.value(other, lambda: 2) == 2
    assert cache.value(KEY, never) == 1


def test_tensors_are_computed_once_and_read_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    written = cache.tensors(KEY, lambda: ENTRIES)
    assert written is not None
    assert cache.tensors(KEY, never) == written
    found = load_file(written)
    assert all(torch.equal(found[entry.name], entry.make()) for entry in ENTRIES)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _other(path: Path) -> None:
    path.write_text(json.dumps({"key": {"kind": "another"}, "sha256": "0", "value": 3}))


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _other, Path.unlink])
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_damaged_entry_is_recomputed(damage: Any, suffix: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    path = cache.tensors(KEY, lambda: ENTRIES)
    assert path is not None
    before = path.read_bytes()
    damage(path.with_suffix(suffix))
    assert cache.tensors(KEY, lambda: ENTRIES) == path
    assert cache.made == 2
    assert path.read_bytes() == before


def test_a_changed_value_is_recomputed(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    cache.value(KEY, lambda: 0.5)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("0.5", "0.6"))
    assert cache.value(KEY, lambda: 0.5) == 0.5
    assert cache.made == 2


def test_an_entry_of_another_key_is_not_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    cache.value(KEY, lambda: 1)
    (path,) = tmp_path.iterdir()
    cache.value({"kind": "another"}, lambda: 2)
    (other,) = set(tmp_path.iterdir()) - {path}
    other.replace(path)
    assert cache.value(KEY, lambda: 1) == 1


def test_concurrent_jobs_all_get_the_tensors(tmp_path: Path) -> None:
    def job(_: int) -> Path | None:
        return Cache(tmp_path, 10**6).tensors(KEY, lambda: ENTRIES)

    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(job, range(40)))
    assert len(paths) == 1
    assert not list(tmp_path.glob(".*.partial"))
    assert Cache(tmp_path, 10**6).tensors(KEY, never) in paths


def test_the_least_recently_used_entry_is_evicted(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 5000)
    for number in range(3):
        cache.value({"number": number}, lambda: "x" * 1000)
        for path in tmp_path.iterdir():  # as if a minute had passed
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))
    assert cache.value({"number": 0}, never)  # used again, so the next one is the oldest
    cache.value({"number": 3}, lambda: "x" * 2000)
    assert cache.value({"number": 0}, never)
    assert cache.value({"number": 3}, never)
    assert cache.value({"number": 1}, lambda: "made again") == "made again"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000


def test_an_entry_that_is_too_large_is_not_kept(tmp_path: Path) -> None:
    def large() -> list[Entry]:
        return [Entry("a", torch.float32, (1000,), never)]

    assert Cache(tmp_path, 7999).tensors(KEY, large) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "jobs", 10**6)
    assert cache.value(KEY, lambda: 3) == 3
    assert cache.tensors(KEY, lambda: ENTRIES) is None
    assert len(caplog.records) == 1
    assert "cannot keep results of this run (" in caplog.text
    assert "cache=false keeps none" in caplog.text


def test_results_of_changed_files_are_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path, 10**6)
    cache.sound = lambda: False
    assert cache.value(KEY, lambda: 3) == 3
    assert cache.tensors(KEY, lambda: ENTRIES) is None
    assert not list(tmp_path.glob("*.json"))
    assert "its input files have changed meanwhile" in caplog.text


def test_files_of_a_killed_job_are_removed_after_a_day(tmp_path: Path) -> None:
    for name, age in (("old", ABANDONED + 60), ("new", 60)):
        path = tmp_path / f".{name}.partial"
        path.write_text("half")
        os.utime(path, (time.time() - age, time.time() - age))
    Cache(tmp_path, 10**6).value(KEY, lambda: 1)
    assert [path.name for path in tmp_path.glob(".*.partial")] == [".new.partial"]


def test_the_environment_sets_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPMQ_CACHE", "~/here")
    assert cache_folder() == Path("~/here").expanduser()
    monkeypatch.delenv("EPMQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/epmq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/epmq").expanduser()
