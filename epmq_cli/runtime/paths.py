"""Paths: expands ~, checks that files are readable, and detects names and links that leave a folder."""

from __future__ import annotations

import os
from pathlib import Path

from epmq_cli.errors import ConfigError, EpmqError

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def expanded(name: str | Path, where: str = "") -> Path:
    """The path with ~ and ~user expanded; ConfigError if the user does not exist. `where`: the option's name, for the
    message."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{where}{': ' * bool(where)}{path} names the home folder of {path.parts[0]}, a user that does not exist; "
            f"give the full path, or ./{path} for a folder of that name"
        ) from error


def read_regular(path: Path) -> str:
    """The text of a regular file in UTF-8; FileNotFoundError for anything else, such as a pipe, which would block."""
    if not path.is_file():
        raise FileNotFoundError("not a regular file")
    return path.read_text(encoding="utf-8")


def check_permitted(path: Path, kind: type[EpmqError], role: str = "") -> None:
    """Raises an error of this kind if the path exists and cannot be read. `role`: its role, for the message."""
    if path.exists() and not os.access(path, os.R_OK):
        raise kind(
            f"{role}{': ' * bool(role)}the user that epmq runs as has no permission to read {path}; change its "
            "permissions, or give another path"
        )


def escapes(name: str) -> bool:
    """Whether a name, taken relative to a folder, leads out of it."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def leaves(path: Path, root: Path | None = None) -> bool:
    """Whether a link leads out of the file's folder, or out of `root` if that contains the folder.

    In the hub's cache, snapshots are folders of links to the `blobs` beside them; these count as inside.
    """
    folder, target = (root or path.parent).resolve(), path.resolve()
    inside = [folder]
    for parent in (folder, *folder.parents):
        if parent.parent.name == SNAPSHOTS:
            inside.append(parent.parent.parent / BLOBS)
    return not any(target.is_relative_to(place) for place in inside)
