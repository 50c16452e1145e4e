"""Finds the class folders and image files of a folder; everything else is skipped, counted and reported."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from epmq_cli.data.pictures import endings
from epmq_cli.errors import DataError
from epmq_cli.runtime.console import log, say

SYSTEM = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "#recycle", "lost+found", "system volume information"}
"""Names, in lower case, of files that operating systems create."""

MARKS = (".", "@", "$", "~$")
"""The first characters of other such names: .DS_Store, .ipynb_checkpoints, @eaDir, $RECYCLE.BIN."""

LISTED = 5  # names in a sentence


@dataclass
class _Entries:
    """The entries of a folder: its images, and the skipped entries by reason."""

    images: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def class_files(folder: Path, labels: Sequence[str | int] | None, other: Path) -> dict[str, list[Path]]:
    """Maps each class to its images, sorted by file name.

    Classes have the order of `labels`, or else of the sorted sub-folders of both splits. `folder`: the folder of the
    split; `other`: the folder of the other split. DataError if sub-folders and labels do not match, or the
    split has no images.
    """
    names = [] if labels is None else [_composed(str(label)) for label in labels]
    top = _entries(folder, names)
    folders = {_composed(path.name): path for path in top.folders}
    if labels is None:
        names = sorted({*folders, *_class_names(folder, other)})
    unknown = [name for name in folders if name not in names]
    if unknown:
        raise DataError(
            f"{folder} has the sub-folders {listed(unknown)}, which are not among data.labels, {listed(names)}; add "
            "them to data.labels or move them elsewhere"
        )
    if not folders:
        raise DataError(
            f"{folder} has no sub-folders; it must have one sub-folder of images for each class, such as "
            f"{listed(names) or 'cat, dog'}"
        )
    contents = {name: _entries(folders[name]) if name in folders else _Entries() for name in names}
    _report(folder, top, contents)
    return {name: entries.images for name, entries in contents.items()}


def flat_images(folder: Path) -> list[Path]:
    """The images of a folder without sub-folders, sorted by file name; none if it has sub-folders."""
    entries = _entries(folder)
    return [] if entries.folders else entries.images


def _class_names(folder: Path, other: Path) -> list[str]:
    """The classes of the other split, so that a class has the same label in both."""
    if not other.is_dir():
        say(f"{other} is not a folder, so the classes are the sub-folders of {folder} alone")
        return []
    return [_composed(path.name) for path in _entries(other).folders]


def _entries(folder: Path, classes: Sequence[str] = ()) -> _Entries:
    """The entries of a folder, sorted by name. Names in `classes` do not count as hidden."""
    entries = _Entries()
    with os.scandir(folder) as scan:
        scanned = sorted(scan, key=lambda entry: entry.name)
    for entry in scanned:
        path = folder / entry.name
        if is_hidden(entry.name) and _composed(entry.name) not in classes:
            entries.hidden.append(path)
        elif entry.is_dir():
            entries.folders.append(path)
        elif path.suffix.lower() in endings() and entry.is_file():
            entries.images.append(path)
        else:
            entries.others.append(path)
    return entries


def _composed(name: str) -> str:
    """The name in Unicode's composed form; some file systems store letters and accents separately."""
    return unicodedata.normalize("NFC", name)


def is_hidden(name: str) -> bool:
    """Whether operating systems and tools create files or folders with this name. Single characters are class names, as
    in data sets of handwriting."""
    return len(name) > 1 and (name.lower() in SYSTEM or name.startswith(MARKS))


def _report(folder: Path, top: _Entries, contents: Mapping[str, _Entries]) -> None:
    """Reports skipped entries and classes without images; DataError if no class has images."""
    parts = [*contents.values()]
    skipped = {
        "hidden files and folders": [*top.hidden, *(path for part in parts for path in part.hidden)],
        "folders inside class folders": [path for part in parts for path in part.folders],
        "files beside the class folders": [*top.images, *top.others],
        "files that are not images by their extension": [path for part in parts for path in part.others],
    }
    summary = "; ".join(
        f"{kind} ({len(paths)}): {_examples(folder, paths)}" for kind, paths in skipped.items() if paths
    )
    if not any(part.images for part in parts):
        raise DataError(
            f"{folder} has no images that Pillow reads in its sub-folders ({summary or 'they are empty'}); put images "
            "into one sub-folder for each class"
        )
    if summary:
        say(f"{folder}: epmq does not read {summary}")
    empty = [name for name, part in contents.items() if not part.images]
    if empty:
        log.warning("%s has no images of %d of the %d classes: %s", folder, len(empty), len(contents), listed(empty))


def _examples(folder: Path, paths: Sequence[Path]) -> str:
    return listed(str(path.relative_to(folder)) for path in paths)


def listed(names: Iterable[str]) -> str:
    """Up to five names, for a sentence."""
    items = list(names)
    return ", ".join(items[:LISTED]) + ", ..." * (len(items) > LISTED)
