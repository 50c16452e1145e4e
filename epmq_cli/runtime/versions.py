"""The versions of installed packages."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def installed_version(package: str) -> str | None:
    """The version of a package; None if it is not installed. Each is read once, since that takes milliseconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
