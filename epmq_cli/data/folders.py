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
    """The entries of a folder: its images, and what is skipped, by reason."""

    images: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def class_files(folder: Path, labels: Sequence[str | int] | None, other: Path) -> dict[str, list[Path]]:
    """Maps each class to its images, sorted by file name.

    The order of the classes is that of `labels`, or that of the sorted sub-folders of both splits. `folder`: the
    folder of the split; `other`: that of the other split. DataError if sub-folders and labels do not match, or the
    split has no images.
    """
    wanted = [] if labels is None else [_composed(str(label)) for label in labels]
    top = _entries(folder, wanted)
    found = {_composed(path.name): path for path in top.folders}
    names = wanted if labels is not None else sorted({*found, *_class_names(folder, other)})
    unknown = [name for name in found if name not in names]
    if unknown:
        raise DataError(
            f"{folder} has the sub-folders {listed(unknown)}, which are not among data.labels, {listed(names)}; add "
            "them to data.labels or move them elsewhere"
        )
    if not found:
        raise DataError(
            f"{folder} has no sub-folders; it must have one sub-folder of images for each class, such as "
            f"{listed(names) or 'cat, dog'}"
        )
    contents = {name: _entries(found[name]) if name in found else _Entries() for name in names}
    _tell(folder, top, contents)
    return {name: entries.images for name, entries in contents.items()}


def flat_images(folder: Path) -> list[Path]:
    """The images of a folder without sub-folders, sorted by file name; none if it has sub-folders."""
    found = _entries(folder)
    return [] if found.folders else found.images


def _class_names(folder: Path, other: Path) -> list[str]:
    """The classes of the other split, so that a class has the same label in both."""
    if not other.is_dir():
        say(f"{other} is not a folder, so the classes are the sub-folders of {folder} alone")
        return []
    return [_composed(path.name) for path in _entries(other).folders]


def _entries(folder: Path, wanted: Sequence[str] = ()) -> _Entries:
    """The entries of a folder, sorted by name. Names in `wanted` do not count as hidden."""
    found = _Entries()
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        path = folder / entry.name
        if is_hidden(entry.name) and _composed(entry.name) not in wanted:
            found.hidden.append(path)
        elif entry.is_dir():
            found.folders.append(path)
        elif path.suffix.lower() in endings() and entry.is_file():
            found.images.append(path)
        else:
            found.others.append(path)
    return found


def _composed(name: str) -> str:
    """The name in Unicode's composed form; some file systems store letters and accents separately."""
    return unicodedata.normalize("NFC", name)


def is_hidden(name: str) -> bool:
    """Whether operating systems and tools create files or folders with this name. Single characters are class names, as
    in data sets of handwriting."""
    return len(name) > 1 and (name.lower() in SYSTEM or name.startswith(MARKS))


def _tell(folder: Path, top: _Entries, contents: Mapping[str, _Entries]) -> None:
    """Reports what is skipped, and classes without images; DataError if no class has images."""
    parts = [*contents.values()]
    left = {
        "hidden files and folders": [*top.hidden, *(path for part in parts for path in part.hidden)],
        "folders inside class folders": [path for part in parts for path in part.folders],
        "files beside the class folders": [*top.images, *top.others],
        "files that are not images by their extension": [path for part in parts for path in part.others],
    }
    said = "; ".join(f"{kind} ({len(paths)}): {_examples(folder, paths)}" for kind, paths in left.items() if paths)
    if not any(part.images for part in parts):
        raise DataError(
            f"{folder} has no images that Pillow reads in its sub-folders ({said or 'they are empty'}); put images "
            "into one sub-folder for each class"
        )
    if said:
        say(f"{folder}: epmq does not read {said}")
    empty = [name for name, part in contents.items() if not part.images]
    if empty:
        log.warning("%s has no images of %d of the %d classes: %s", folder, len(empty), len(contents), listed(empty))


def _examples(folder: Path, paths: Sequence[Path]) -> str:
    return listed(str(path.relative_to(folder)) for path in paths)


def listed(names: Iterable[str]) -> str:
    """Up to five names, for a sentence."""
    known = list(names)
    return ", ".join(known[:LISTED]) + ", ..." * (len(known) > LISTED)
