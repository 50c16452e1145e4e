"""How much a command tells of its progress: the variable that `progress=KIND` sets."""

from __future__ import annotations

import os

PROGRESS = "EPMQ_PROGRESS"
"""The variable with the kind of progress; child processes inherit it."""
KINDS = ("auto", "json", "quiet")


def kind() -> str:
    """The kind of progress."""
    return os.environ.get(PROGRESS, "auto")
