"""Time and peak memory of each stage, as a table with bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epmq_cli.report import numbers
from epmq_cli.runtime.units import duration, size

HOST, DEVICE = "peak_host_bytes", "peak_device_bytes"


def section(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of stages with the lengths of their bars in %; None without stages."""
    stages = content["stages"]
    if not stages:
        return None
    columns = [HOST] + [DEVICE] * any(stage[DEVICE] is not None for stage in stages.values())
    longest = max(stage["seconds"] for stage in stages.values()) or 1
    largest = {key: max(stage[key] or 0 for stage in stages.values()) or 1 for key in columns}
    rows = [
        {
            "name": name,
            "time": duration(stage["seconds"]),
            "time_bar": 100 * stage["seconds"] / longest,
            "memory": [(size(stage[key] or 0), 100 * (stage[key] or 0) / largest[key]) for key in columns],
        }
        for name, stage in stages.items()
    ]
    return {
        "rows": rows,
        "total": duration(numbers.seconds(content)),
        "peaks": [size(largest[key]) for key in columns],
        "device": DEVICE in columns,
        "resumed": content.get("resumed", 0),
        "environment": content["environment"],
    }
