"""Folder names for the jobs of a sweep."""

from __future__ import annotations

import hashlib
import re

from omegaconf import OmegaConf

LONGEST = 255  # bytes, the longest name that file systems accept
READABLE = 120  # bytes that are kept of a longer name
DIGITS = 12  # of the sha256 of the job's overrides
UNSAFE = re.compile(r"""[^\w.,=+@%^~:!#()\[\]{}-]""")
"""Characters that separate folders or words, or that a shell interprets."""


def folder_name(overrides: str) -> str:
    """The folder name of a job: its overrides, if they are a valid name. Otherwise the overrides without unsafe
    characters, cut to `READABLE` bytes, and a hash of all of them, so that no two jobs share a folder."""
    name = UNSAFE.sub("_", overrides)
    if name == overrides and len(name.encode()) <= LONGEST and not name.startswith("."):
        return name
    kept = name.lstrip(".").encode()[:READABLE].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(overrides.encode()).hexdigest()[:DIGITS]}"


def register() -> None:
    """Registers `folder_name` for configs, as `${folder_name:...}`."""
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
