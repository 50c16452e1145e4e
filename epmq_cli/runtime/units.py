"""Sizes and durations as text, the same in every table, page and message."""

from __future__ import annotations

SIZES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def size(count: float) -> str:
    """Bytes in the largest fitting unit, with three digits: 1.23 MB, 99.0 MB, 268 MB."""
    for unit, factor in SIZES.items():
        value = count / factor
        if value >= 0.9995:  # which rounds to 1
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{count:.0f} B"


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
