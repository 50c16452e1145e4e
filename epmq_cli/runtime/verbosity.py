"""How much a command tells of its progress: the variable that `progress=KIND` sets, and durations as text."""

from __future__ import annotations

import os

PROGRESS = "EPMQ_PROGRESS"
"""The variable with the kind of progress; child processes inherit it."""
KINDS = ("auto", "json", "quiet")


def kind() -> str:
    """The kind of progress."""
    return os.environ.get(PROGRESS, "auto")


def duration(time: float) -> str:
    """Seconds as text: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if time < 9.95:
        return f"{time:.1f} s"
    whole = round(time)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
