"""Oracle: texts worked out by hand, also at the borders of the units."""

from __future__ import annotations

import pytest

from epmq_cli.runtime.units import duration, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (2.84, "2.8 s"),
        (9.96, "10 s"),
        (59.7, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.7, "1 h 0 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_234, "1.23 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (99_000_000, "99.0 MB"),
        (1.5e9, "1.50 GB"),
        (2e12, "2000 GB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text
