"""Contents of metrics.json for reports, with few numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STAGE = {"seconds": 2.0, "peak_host_bytes": 4_000_000, "peak_device_bytes": None}
STAGES = ("base", "merged", "quantized", "experts")


def layer(name: str, loss: float | None, bits: int | None = 4, fallback: str | None = None) -> dict[str, Any]:
    """The entry of a linear."""
    return {"name": name, "bits": bits, "loss_merged": loss, "loss_target": loss, "loss": loss, "fallback": fallback}


def content(
    scores: Mapping[str, tuple[float, ...]], metric: str = "accuracy", error: float | None = None, **changes: Any
) -> dict[str, Any]:
    """The content of a run; `scores`: by task, in the order of `STAGES`; `error`: the standard error of each, of 100
    samples a task."""
    averages = [sum(column) / len(scores) for column in zip(*scores.values(), strict=True)]
    found: dict[str, Any] = {
        "command": "run",
        "created": "2026-01-02T03:04:05+00:00",
        "overrides": ["bits=3"],
        "config": {
            "bits": 3,
            "suite": {"_target_": "epmq_cli.data.suite.Suite", "name": "tiny", "tasks": dict.fromkeys(scores)},
        },
        "environment": {
            "python": "3.12",
            "packages": {"torch": "2"},
            "device": "cpu",
            "device_name": "x",
            "threads": 1,
        },
        "scores": {
            "metrics": dict.fromkeys(scores, metric),
            "tasks": {task: dict(zip(STAGES, values, strict=True)) for task, values in scores.items()},
            "average": dict(zip(STAGES, averages, strict=False)),
        },
        "layers": [layer("model.layers.0.q", 0.01), layer("model.layers.1.q", 0.1, fallback="rtn")],
        "average_bits": 4.0,
        "bytes": {"model_dense": 8_000_000, "model_packed": 2_500_000},
        "stages": {"read": STAGE, "pack": STAGE},
        "resumed": 0,
    }
    if error is not None:
        errors = dict.fromkeys(STAGES, error)
        average = dict.fromkeys(STAGES, error / len(scores) ** 0.5)
        found["scores"]["samples"] = dict.fromkeys(scores, 100)
        found["scores"]["standard_errors"] = {"tasks": dict.fromkeys(scores, errors), "average": average}
    return found | changes


def write_run(folder: Path, found: Mapping[str, Any]) -> Path:
    """A run folder with this metrics.json."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(found))
    return folder
