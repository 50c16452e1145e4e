"""Reads finished runs from run folders and multirun folders, and says what is missing of the others."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from epmq_cli.report.numbers import seconds
from epmq_cli.report.table import counted
from epmq_cli.runtime.paths import read_regular
from epmq_cli.runtime.units import duration
from epmq_cli.store.run_lock import in_use

METRICS, HYDRA, MULTIRUN = "metrics.json", ".hydra", "multirun.yaml"
PARTS: dict[str, type] = {"command": str, "overrides": list, "config": dict, "stages": dict, "environment": dict}
"""The entries of metrics.json that every run has."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and the content of its metrics.json."""

    folder: Path
    content: dict[str, Any]


@dataclass
class Found:
    """The finished runs, and a sentence for each folder without one and for each sweep that is not done."""

    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(folders: Sequence[Path]) -> Found:
    """The runs in run folders and in folders of run folders, such as those of sweeps; each once."""
    found = Found()
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        if not folder.is_dir():
            found.notes.append(f"{folder} is not a folder; give the folder of a run or a sweep")
        elif (folder / METRICS).exists():
            _add(found, folder)
        elif jobs := _jobs(folder):
            _add_sweep(found, folder, jobs)
        elif (folder / HYDRA).is_dir():
            found.notes.append(_unfinished(folder))
        else:
            found.notes.append(f"{folder} has no {METRICS} and no runs in it; give the folder of a run or a sweep")
    found.runs = list({run.folder: run for run in found.runs}.values())
    return found


def _jobs(folder: Path) -> list[Path]:
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path for path in inside if (path / METRICS).exists() or (path / HYDRA).is_dir()]


def _add(found: Found, folder: Path) -> None:
    try:
        content = json.loads(read_regular(folder / METRICS))
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and all(isinstance(content.get(key), kind) for key, kind in PARTS.items()):
        found.runs.append(Run(folder, content))
    else:
        found.notes.append(f"{folder / METRICS} is not what epmq wrote; remove {folder} and run it again")


def _add_sweep(found: Found, folder: Path, jobs: Sequence[Path]) -> None:
    """Adds the finished jobs of a sweep. One sentence counts them if others are left; others name the jobs that
    stopped."""
    before = len(found.runs)
    open_jobs = []
    for job in jobs:
        if (job / METRICS).exists():
            _add(found, job)
        else:
            open_jobs.append(job)
    running = [job for job in open_jobs if in_use(job)]
    durations = [seconds(run.content) for run in found.runs[before:]]
    total = max(planned(folder / MULTIRUN) or 0, len(jobs))
    if total > len(jobs) - len(open_jobs):
        elapsed = [time.time() - (job / HYDRA).stat().st_mtime for job in running]
        left = time_left(durations, total - (len(jobs) - len(open_jobs)), elapsed)
        found.notes.append(
            f"{folder}: {len(jobs) - len(open_jobs)} of {counted(total, 'job')} finished"
            + (f", {len(running)} running" if running else ", none running")
            + (f", about {duration(left)} left" if running and left is not None else "")
        )
    found.notes += [_unfinished(job) for job in open_jobs if job not in running]


def _unfinished(folder: Path) -> str:
    if in_use(folder):
        return f"{folder} is still running"
    return f"{folder} was started and not finished; start the same command again to continue it"


def time_left(durations: Sequence[float], jobs: int, elapsed: Sequence[float]) -> float | None:
    """The seconds that a sweep still takes, if each unfinished job takes the mean of the finished ones; None if none is
    finished. `elapsed`: how long each running job has run; as many run at a time to the end."""
    if not durations:
        return None
    mean = sum(durations) / len(durations)
    work = mean * jobs - sum(min(mean, time) for time in elapsed)
    return work / max(1, len(elapsed))


def planned(path: Path) -> int | None:
    """The number of jobs of a sweep, from the multirun.yaml that Hydra wrote; None if it cannot be told."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        content = yaml.safe_load(read_regular(path))
        texts = content["hydra"]["overrides"]["task"]
        overrides = OverridesParser.create().parse_overrides(texts)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, HydraException, RecursionError):
        return None
    jobs = 1
    for override in overrides:
        if override.is_sweep_override():
            if not override.is_discrete_sweep() or override.value_type is None or "GLOB" in override.value_type.name:
                return None
            jobs *= sum(1 for _ in override.sweep_string_iterator())
    return jobs


def overrides_of(content: Mapping[str, Any]) -> dict[str, str]:
    """The overrides of a run by key; without Hydra's signs of added options."""
    pairs = [str(override).lstrip("+").partition("=") for override in content["overrides"]]
    return {key: value for key, sign, value in pairs if sign}
