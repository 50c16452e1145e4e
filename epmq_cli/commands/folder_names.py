"""Folder names for the jobs of a sweep."""

from __future__ import annotations

import hashlib
import re

from omegaconf import OmegaConf

LONGEST = 255  # bytes of the longest name that file systems accept
READABLE = 120  # bytes to which longer names are cut
DIGITS = 12  # hexadecimal digits of the sha256 of the job's overrides
UNSAFE = re.compile(r"""[^\w.,=+@%^~:!#()\[\]{}-]""")
"""Characters that separate folders or words, or that a shell interprets."""
ADDED = re.compile(r"(^|,)\+\+")
"""Hydra's sign of an added option, which epmq puts in front of some (`overrides.addable`)."""


def folder_name(overrides: str) -> str:
    """The folder name of a job: its overrides, without `++`, if they are a valid name. Otherwise unsafe characters are
    replaced, the name is cut to `READABLE` bytes, and a hash of the overrides is appended so that no two jobs share a
    folder."""
    overrides = ADDED.sub(r"\1", overrides)
    name = UNSAFE.sub("_", overrides)
    if name == overrides and len(name.encode()) <= LONGEST and not name.startswith("."):
        return name
    readable = name.lstrip(".").encode()[:READABLE].decode(errors="ignore")
    return f"{readable}-{hashlib.sha256(overrides.encode()).hexdigest()[:DIGITS]}"


def register() -> None:
    """Registers `folder_name` for configs, as `${folder_name:...}`."""
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
