"""metrics.json: results and measurements of a command, as metrics.schema.json describes them."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from epmq_cli.errors import RunError
from epmq_cli.evaluate.metrics import average, average_error
from epmq_cli.evaluate.score import Scores
from epmq_cli.runtime.versions import installed_version
from epmq_cli.store.atomic import write_text

SCHEMA_VERSION = 2
HARNESS = "lm_eval"
PACKAGES = ("epmq-cli", "torch", "transformers", "compressed-tensors", "safetensors", "hydra-core", "numpy")


def schema() -> dict[str, Any]:
    """The JSON schema of metrics.json."""
    text = Path(__file__).with_name("metrics.schema.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def environment(device: torch.device) -> dict[str, Any]:
    """The versions and hardware behind the numbers."""
    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def by_task(scores: Scores, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Scores by task and stage, and the mean over tasks by stage; their standard errors and the number of test samples,
    as far as they are known. `kinds`: the metric of each task. Tasks without one come from lm-evaluation-harness."""
    tasks = list(dict.fromkeys(task for by_task in scores.values() for task in by_task))
    own = {task: {stage: by_task[task] for stage, by_task in scores.items() if task in by_task} for task in tasks}
    means, errors = {}, {}
    for stage, by_task in scores.items():
        metric = kinds.get(next(iter(by_task)), HARNESS)
        means[stage] = average([score.value for score in by_task.values()], metric)
        errors[stage] = average_error([*by_task.values()], metric)
    counts = {task: next(iter(by_stage.values())).samples for task, by_stage in own.items()}
    return {
        "metrics": {task: kinds.get(task, HARNESS) for task in tasks},
        "tasks": {task: {stage: score.value for stage, score in by_stage.items()} for task, by_stage in own.items()},
        "average": means,
        "samples": _known(counts),
        "standard_errors": {
            "tasks": {
                task: _known({stage: score.error for stage, score in by_stage.items()})
                for task, by_stage in own.items()
            },
            "average": _known(errors),
        },
    }


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def metrics(
    command: str, overrides: Sequence[str], config: Any, device: torch.device, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of metrics.json; `measured`: the entries of the command."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "overrides": list(overrides),
        "config": config,
        "environment": environment(device),
        **measured,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the file atomically; RunError if that fails."""
    try:
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}); free some space there or choose another out"
        ) from error
