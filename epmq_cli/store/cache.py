"""Results that jobs have in common, on disk, each under a name made of all that it depends on.

Nothing is ever brought up to date: what depends on anything else has another name. An entry is NAME.json, with the key
that the name was made of and a value; tensors are beside it in NAME.safetensors, written first, with their sha256 in
NAME.json. Files get their names when all of their bytes are on disk, so jobs that make the same entry at the same time
only do so twice. What is read is checked; what is damaged, or cannot be written, is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.config.schema import bytes_of
from epmq_cli.errors import ConfigError
from epmq_cli.runtime.paths import expanded

if TYPE_CHECKING:
    from epmq_cli.store.safetensors_writer import Entry

Key = Mapping[str, Any]
"""All that a result depends on, as JSON."""
PARTIAL = ".partial-"
ABANDONED = 24 * 3600  # seconds after which a file that is not whole is nobody's

log = logging.getLogger("epmq")


def cache_folder() -> Path:
    """Where epmq keeps what it can make again: $EPMQ_CACHE, or epmq in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("EPMQ_CACHE"):
        return expanded(own, "EPMQ_CACHE")
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "epmq"


def open_cache(limit: object) -> Cache | None:
    """The cache of a config's `cache`: its room such as 10GB, or None where that is false."""
    if limit is None or limit is False:
        return None
    if limit is True:
        raise ConfigError("cache must be its room on disk such as 10GB, or false, got true")
    return Cache(cache_folder() / "jobs", bytes_of("cache", limit))


class Cache:
    """Entries of at most `room` bytes together; what has not been asked for longest makes place.

    `sound`: asked before an entry is kept; False where what it was made of may have changed since its key was made.
    """

    def __init__(self, folder: Path, limit: int, failure: int = logging.WARNING) -> None:
        self._folder, self._room = folder, limit
        self._failure = failure
        self.sound: Callable[[], bool] = lambda: True
        self.found = 0
        """Entries that were there."""
        self.made = 0
        """Entries that had to be made."""

    def value(self, key: Key, make: Callable[[], Any]) -> Any:
        """What `make` gives, as JSON can hold it, or gave when it was asked for under this key."""
        path = self._path(key)
        known = self._known(path, key)
        if known is not None and known.get("sha256") == _sha256(known.get("value")):
            return self._taken(path, known["value"])
        value = make()
        self._keep(lambda: self._record(path, key, _sha256(value), value))
        return value

    def tensors(self, key: Key, make: Callable[[], Sequence[Entry]]) -> Path | None:
        """A safetensors file with these tensors, each made when it is written; None where the room or the disk has no
        place for it."""
        from epmq_cli.store.hashing import content

        path = self._path(key)
        file, known = path.with_suffix(".safetensors"), self._known(path, key)
        with suppress(OSError):
            if known is not None and content(file).sha256 == known.get("sha256"):
                os.utime(file)
                return self._taken(path, file)  # type: ignore[no-any-return]
        entries = make()
        if sum(entry.size for entry in entries) > self._room // 2:  # it would push out all else
            self.made += 1
            return None
        return file if self._keep(lambda: self._write(path, key, entries)) else None

    def _path(self, key: Key) -> Path:
        return self._folder / f"{_sha256(key)[:40]}.json"

    def _known(self, path: Path, key: Key) -> dict[str, Any] | None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) and _sha256(record.get("key")) == _sha256(key) else None

    def _taken(self, path: Path, value: Any) -> Any:
        self.found += 1
        with suppress(OSError):  # another job may have removed it since
            os.utime(path)
        return value

    def _keep(self, write: Callable[[], None]) -> bool:
        """Whether an entry could be written; a full disk is no reason to stop."""
        self.made += 1
        try:
            write()
            self._trim()
        except OSError as error:
            log.log(
                self._failure, "%s cannot keep a result of this run (%s); cache=false keeps none", self._folder, error
            )
            return False
        return True

    def _write(self, path: Path, key: Key, entries: Sequence[Entry]) -> None:
        from epmq_cli.store.hashing import content
        from epmq_cli.store.safetensors_writer import write_file

        with new_file(path.with_suffix(".safetensors")) as partial:
            write_file(partial, entries)
            sha256 = content(partial).sha256
        self._record(path, key, sha256, None)

    def _record(self, path: Path, key: Key, sha256: str, value: Any) -> None:
        if not self.sound():
            raise OSError("files that it was made of have changed meanwhile")
        with new_file(path) as partial:
            partial.write_text(json.dumps({"key": key, "sha256": sha256, "value": value}), encoding="utf-8")

    def _trim(self) -> None:
        """Removes what was asked for longest ago until the rest has room, and what no job will finish."""
        files = sorted(_files(self._folder), key=lambda file: -file[1])
        used = 0
        for path, asked, size in files:
            used += size
            old = path.name.startswith(PARTIAL) and asked < time.time() - ABANDONED
            if old or used > self._room:
                path.unlink(missing_ok=True)


def _files(folder: Path) -> Iterator[tuple[Path, float, int]]:
    """Each file with the time it was last asked for and its bytes."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # other jobs remove some, too
            state = path.stat()
            yield path, state.st_mtime, state.st_size


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to be written, which gets its name when all of it is on disk, whoever else writes it; none after an error.

    Its folder is made, for nobody else to write in.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=PARTIAL, dir=path.parent)
    partial = Path(name)
    try:
        yield partial
        os.fsync(number)
        partial.replace(path)
    finally:
        os.close(number)
        partial.unlink(missing_ok=True)
