"""A cache on disk for results that runs share. The name of an entry is a hash of everything that the result depends on.

Entries are never updated: another input gives another name. An entry is NAME.json with the key that NAME is the hash
of, and a value. Tensors are beside it in NAME.safetensors, written first, and their sha256 is in
NAME.json. Files are written atomically, so runs that compute the same entry at the same time only repeat the work.
Entries are checked when they are read; a corrupted or missing entry is computed again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.runtime.paths import expanded
from epmq_cli.store.atomic import atomic_file
from epmq_cli.store.hashing import content, hash_json

if TYPE_CHECKING:
    from epmq_cli.store.safetensors_writer import Entry

Key = Mapping[str, Any]
"""Everything that a result depends on, as JSON."""
ABANDONED = 24 * 3600  # seconds after which an incomplete file is removed
SETTLED = 2_000_000_000  # nanoseconds
HASHES_SIZE = 1 << 24  # bytes, some 30000 files

log = logging.getLogger("epmq")


def cache_folder() -> Path:
    """The cache folder, which is always safe to delete: $EPMQ_CACHE, or epmq in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("EPMQ_CACHE"):
        return expanded(own, "EPMQ_CACHE")
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "epmq"


class Cache:
    """Entries of at most `capacity` bytes in total; the least recently used ones are evicted.

    `sound` is called before an entry is written; it returns False if the input files may have changed since the key was
    computed.
    """

    def __init__(self, folder: Path, capacity: int, failure: int = logging.WARNING) -> None:
        self._folder, self._capacity, self._failed = folder, capacity, False
        self._failure = failure
        self.sound: Callable[[], bool] = lambda: True
        self.found = 0
        """The number of cache hits."""
        self.made = 0
        """The number of cache misses, whose entries were computed."""

    def value(self, key: Key, make: Callable[[], Any]) -> Any:
        """The JSON value of this key: from the cache, or else from `make`."""
        path = self._path(key)
        record = self._record(path, key)
        if record is not None and record.get("sha256") == hash_json(record.get("value")):
            return self._use(path, record["value"])
        value = make()
        self._keep(lambda: self._write_record(path, key, hash_json(value), value))
        return value

    def tensors(self, key: Key, make: Callable[[], Sequence[Entry]]) -> Path | None:
        """A safetensors file with these tensors, each computed when it is written; None if the cache or the disk has no
        space for it."""
        path = self._path(key)
        file, record = path.with_suffix(".safetensors"), self._record(path, key)
        with suppress(OSError):
            if record is not None and content(file).sha256 == record.get("sha256"):
                os.utime(file)
                return self._use(path, file)  # type: ignore[no-any-return]
        entries = make()
        if sum(entry.size for entry in entries) > self._capacity // 2:  # it would evict everything else
            self.made += 1
            return None
        return file if self._keep(lambda: self._write_tensors(path, key, entries)) else None

    def _path(self, key: Key) -> Path:
        return self._folder / f"{hash_json(key)[:40]}.json"

    def _record(self, path: Path, key: Key) -> dict[str, Any] | None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) and hash_json(record.get("key")) == hash_json(key) else None

    def _use(self, path: Path, value: Any) -> Any:
        self.found += 1
        with suppress(OSError):  # another run may have evicted it since
            os.utime(path)
        return value

    def _keep(self, write: Callable[[], None]) -> bool:
        """Writes an entry. Returns whether that worked: a full disk does not stop the run."""
        self.made += 1
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # nobody else may write into it
            write()
            self._evict()
        except OSError as error:
            if not self._failed:
                log.log(
                    self._failure,
                    "%s cannot keep results of this run (%s); cache=false keeps none",
                    self._folder,
                    error,
                )
            self._failed = True
            return False
        return True

    def _write_tensors(self, path: Path, key: Key, entries: Sequence[Entry]) -> None:
        from epmq_cli.store.safetensors_writer import write_file  # imports torch

        with atomic_file(path.with_suffix(".safetensors"), shared=True) as partial:
            partial.touch(mode=0o600)
            sha256 = write_file(partial, entries).sha256
        self._write_record(path, key, sha256, None)

    def _write_record(self, path: Path, key: Key, sha256: str, value: Any) -> None:
        if not self.sound():
            raise OSError("its input files have changed meanwhile")
        with atomic_file(path, shared=True) as partial:
            partial.touch(mode=0o600)
            partial.write_text(json.dumps({"key": key, "sha256": sha256, "value": value}), encoding="utf-8")

    def _evict(self) -> None:
        """Removes the least recently used files until the rest fits, and incomplete ones that no run will finish."""
        files = sorted(_files(self._folder), key=lambda file: -file[1])
        used = 0
        for path, last_use, size in files:
            used += size
            abandoned = path.suffix == ".partial" and last_use < time.time() - ABANDONED
            if abandoned or used > self._capacity:
                path.unlink(missing_ok=True)


def _files(folder: Path) -> Iterator[tuple[Path, float, int]]:
    """Each file with the time of its last use and its size in bytes."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # other runs evict some, too
            stat = path.stat()
            yield path, stat.st_mtime, stat.st_size


class FileHashes:
    """The sha256 of files, cached while their size, times and inode stay the same; not cached if `folder` is None.

    A file of gigabytes is read once. Sizes and times alone cannot be keys of results: a copied folder has other times
    but the same results, and fine-tuning changes no size. As in git, a hash is not cached until
    the file is unchanged for `SETTLED`: two writes within one tick of the file system's clock have equal times.
    """

    def __init__(self, folder: Path | None) -> None:
        self._cache = None if folder is None else Cache(folder, HASHES_SIZE)

    def file(self, path: Path) -> str:
        """The sha256 of a file."""
        path, stat = path.resolve(), path.stat()
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        if self._cache is None or time.time_ns() - max(times) <= SETTLED:
            return content(path).sha256
        key = {"path": os.fsdecode(path), "device": stat.st_dev, "inode": stat.st_ino, "size": stat.st_size}
        return str(self._cache.value({**key, "times": times}, lambda: content(path).sha256))

    def files(self, paths: Mapping[str, Path]) -> dict[str, str]:
        """The sha256 of each file, by name."""
        with ThreadPoolExecutor() as pool:
            return dict(zip(paths, pool.map(self.file, paths.values()), strict=True))
