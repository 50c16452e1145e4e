"""Paths that a user named: with ~ for a home folder, and perhaps of files that may not or cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

from epmq_cli.errors import ConfigError, EpmqError


def expanded(name: str | Path, where: str = "") -> Path:
    """The path, ~ and ~user being home folders; ConfigError where there is no such user. `where`: what it was given as,
    for that."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{where}{': ' * bool(where)}{path} is in no home folder, as there is no user {path.parts[0]} here; write "
            f"the path out, or ./{path} for a folder of that name"
        ) from error


def read_regular(path: Path) -> str:
    """The text of a file in UTF-8; FileNotFoundError where it is none, as a pipe, which one would wait for."""
    if not path.is_file():
        raise FileNotFoundError("no file")
    return path.read_text(encoding="utf-8")


def check_permitted(path: Path, kind: type[EpmqError], role: str = "") -> None:
    """The error of this kind where the file or folder is there and may not be read; `role`: what it is, for that."""
    if path.exists() and not os.access(path, os.R_OK):
        raise kind(
            f"{role}{': ' * bool(role)}{path} may not be read by the user that epmq runs as; change its permissions, "
            "or give another"
        )
