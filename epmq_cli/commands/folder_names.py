"""The names of the folders of a sweep's jobs."""

from __future__ import annotations

import hashlib
import re

from omegaconf import OmegaConf

LONGEST = 255  # bytes of a name that file systems take
READABLE = 120  # bytes that are kept of a longer one
DIGITS = 12  # of the sha256 of what the job was asked for
UNSAFE = re.compile(r"""[^\w.,=+@%^~:!#()\[\]{}-]""")
"""What separates folders or words, or means something to a shell."""


def folder_name(overrides: str) -> str:
    """The folder of a job with these overrides: themselves where a folder can be called so. Otherwise what is left of
    them without such characters, cut to `READABLE` bytes, and a hash of all of them, so that no two jobs share one."""
    name = UNSAFE.sub("_", overrides)
    if name == overrides and len(name.encode()) <= LONGEST and not name.startswith("."):
        return name
    kept = name.lstrip(".").encode()[:READABLE].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(overrides.encode()).hexdigest()[:DIGITS]}"


def register() -> None:
    """Makes `folder_name` known to configs, as `${folder_name:...}`."""
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
