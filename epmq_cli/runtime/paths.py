"""Paths as users type them: expands ~ and checks that files are readable."""

from __future__ import annotations

import os
from pathlib import Path

from epmq_cli.errors import ConfigError, EpmqError


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
