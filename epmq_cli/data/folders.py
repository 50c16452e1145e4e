"""Which folders are classes and which of their files are images; what is neither is left out, counted and said."""

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
"""Names, in lower case, that operating systems put beside a user's own."""

MARKS = (".", "@", "$", "~$")
"""How other such names begin: .DS_Store, .ipynb_checkpoints, @eaDir, $RECYCLE.BIN."""

LISTED = 5  # names in a sentence


@dataclass
class _Entries:
    """What is in a folder: its images, and what is left out of it by the reason."""

    images: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def class_files(folder: Path, labels: Sequence[str | int] | None, other: Path) -> dict[str, list[Path]]:
    """Class name -> its images by file name, in the order of the classes: that of `labels`, or the sorted names of the
    sub-folders of both splits. `folder`: the split's; `other`: the other split's.

    DataError where sub-folders and labels do not fit, or the split has no image.
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
            f"{folder} must have one sub-folder of images for each class, such as {listed(names) or 'cat, dog'}, and "
            "has none"
        )
    contents = {name: _entries(found[name]) if name in found else _Entries() for name in names}
    _tell(folder, top, contents)
    return {name: entries.images for name, entries in contents.items()}


def flat_images(folder: Path) -> list[Path]:
    """The images of a folder that has no sub-folders, by file name; none where it has some."""
    found = _entries(folder)
    return [] if found.folders else found.images


def _class_names(folder: Path, other: Path) -> list[str]:
    """Of the other split, so that a class has the same number in both."""
    if not other.is_dir():
        say(f"{other} is not a folder, so that the classes are the sub-folders of {folder} alone")
        return []
    return [_composed(path.name) for path in _entries(other).folders]


def _entries(folder: Path, wanted: Sequence[str] = ()) -> _Entries:
    """The entries of a folder by name; those that `wanted` names are not hidden."""
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
    """The name with each letter one character, as some file systems take letters and their accents apart."""
    return unicodedata.normalize("NFC", name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is one that operating systems and tools leave behind. A single character
    is not: sets of written characters have such classes."""
    return len(name) > 1 and (name.lower() in SYSTEM or name.startswith(MARKS))


def _tell(folder: Path, top: _Entries, contents: Mapping[str, _Entries]) -> None:
    """Says what is left out, and which classes have no images; DataError where none has."""
    parts = [*contents.values()]
    left = {
        "hidden files and folders": [*top.hidden, *(path for part in parts for path in part.hidden)],
        "folders inside class folders": [path for part in parts for path in part.folders],
        "files beside the class folders": [*top.images, *top.others],
        "files whose ending is not that of an image": [path for part in parts for path in part.others],
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
    """Some names for a sentence."""
    known = list(names)
    return ", ".join(known[:LISTED]) + ", ..." * (len(known) > LISTED)
