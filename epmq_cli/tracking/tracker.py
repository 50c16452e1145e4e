"""Records complete runs in an experiment tracker: a Hydra callback for each (`tracking=<name>`).

A tracker reads what the run wrote, after its end: it needs no place in the run, and its failure is a warning. A new
tracker is a subclass with `record`, a YAML in conf/tracking/, an extra and a test.
"""

from __future__ import annotations

import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from epmq_cli.errors import first_line
from epmq_cli.runtime import distributed
from epmq_cli.runtime.console import log

METRICS, REPORT = "metrics.json", "report.html"
LONGEST = 500
"""The most characters of a parameter's value."""
UNUSUAL = re.compile(r"[^\w .-]")
"""Characters of names that trackers do not take, or read as a path."""


@dataclass(frozen=True)
class RunRecord:
    """What trackers record of a run.

    `params`: the config by full key. `metrics`: `score/TASK/STAGE`, `seconds/STAGE`, `bytes/NAME` and so on.
    `artifacts`: files. `ended`: in seconds since 1970.
    """

    name: str
    params: dict[str, str]
    metrics: dict[str, float]
    artifacts: tuple[Path, ...]
    ended: float


class Tracker(Callback, ABC):
    """A Hydra callback that records each complete job of a run or a sweep."""

    package: ClassVar[str]
    """The package that the tracker imports, and the name of its extra."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes the time: a job whose results are older was complete already."""
        self._started = time.time()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Records the job if it is complete. Warns if the tracker fails."""
        if job_return.status != JobStatus.COMPLETED or not distributed.is_main():
            return
        try:
            record = run_record(config, self._started)
            if record is not None:
                self.record(record)
        except ImportError:
            log.warning(
                "tracking=%s needs the package %s, so the run is not recorded; get it with pip install 'epmq-cli[%s]'",
                *([self.package] * 3),
            )
        except Exception as error:  # whatever a tracker raises must not end a complete run
            log.warning("tracking=%s failed, so the run is not recorded: %s", self.package, first_line(error))

    @abstractmethod
    def record(self, run: RunRecord) -> None:
        """Writes a run to the tracker's store."""


def run_record(config: DictConfig, since: float) -> RunRecord | None:
    """The record of the job with this config, Hydra's included; None if it has written no metrics.json `since` then."""
    folder = Path(config.hydra.runtime.output_dir)
    path = folder / METRICS
    if not path.is_file() or path.stat().st_mtime < since - 1:  # clocks of file systems are coarse
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    report = folder / REPORT
    return RunRecord(
        name=folder.name,
        params=dict(_flat("", content["config"])),
        metrics=dict(_numbers(content)),
        artifacts=(report,) if report.is_file() else (),
        ended=path.stat().st_mtime,
    )


def _flat(prefix: str, node: Any) -> Iterator[tuple[str, str]]:
    """The values of a config by full key. A list is one value."""
    if not isinstance(node, dict) or not node:
        yield _key(prefix), _text(node)
        return
    for name, value in node.items():
        yield from _flat(f"{prefix}.{name}" if prefix else str(name), value)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _numbers(content: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The measurements in metrics.json."""
    scores = content.get("scores") or {"tasks": {}, "average": {}}
    for task, stages in {**scores["tasks"], "average": scores["average"]}.items():
        for stage, score in stages.items():
            yield f"score/{_key(task)}/{_key(stage)}", float(score)
    errors = scores.get("standard_errors") or {"tasks": {}, "average": {}}
    for task, stages in {**errors["tasks"], "average": errors["average"]}.items():
        for stage, error in stages.items():
            yield f"standard_error/{_key(task)}/{_key(stage)}", float(error)
    for task, count in scores.get("samples", {}).items():
        yield f"samples/{_key(task)}", float(count)
    for stage, record in content["stages"].items():
        for name, unit in (("seconds", 1.0), ("peak_host_bytes", 1e-6), ("peak_device_bytes", 1e-6)):
            if record.get(name) is not None:
                kind = "seconds" if name == "seconds" else f"{name.removesuffix('_bytes')}_mb"
                yield f"{kind}/{_key(stage)}", round(float(record[name]) * unit, 3)
    for part in ("bytes", "events"):
        for name, count in content.get(part, {}).items():
            yield f"{part}/{_key(name)}", float(count)
    if content.get("average_bits") is not None:
        yield "average_bits", float(content["average_bits"])


def _key(name: str) -> str:
    """A name that every tracker takes."""
    return UNUSUAL.sub("_", name).strip(". ") or "_"
