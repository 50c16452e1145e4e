"""The outcomes of the users' folders in tests/end_to_end/foreign, for the last lines of pytest's report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

FOREIGN = "foreign"
"""The user property that holds the outcome of a test; pytest passes it on from other processes too."""
ALWAYS = ("taken", "refused", "silently wrong")


def foreign_line(reports: Iterable[Any]) -> str | None:
    """The number of combinations by outcome; None if none were tried."""
    found = Counter(value for report in reports for key, value in report.user_properties if key == FOREIGN)
    if not found:
        return None
    rest = [name for name in sorted(found) if name not in ALWAYS]
    parts = [f"{found[name]} {name}" for name in (*ALWAYS, *rest)]
    return f"{FOREIGN}: {sum(found.values())} combinations, {', '.join(parts)}"
