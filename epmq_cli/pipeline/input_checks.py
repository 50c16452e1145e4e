"""Checks of a run's models and data before torch is imported, which takes seconds. The run makes the same checks again,
and others, when it reads them."""

from __future__ import annotations

from pathlib import Path

from epmq_cli.config.schema import GENERATE, scores_samples
from epmq_cli.data.samples import CheckedSource, Source, Split
from epmq_cli.data.sampling import check_some, scored_source
from epmq_cli.merge.suite_models import open_member
from epmq_cli.models.open_clip.config import SCHEME
from epmq_cli.models.resolve import local_path
from epmq_cli.pipeline.job import Job
from epmq_cli.runtime.console import silent

LAZY = (".safetensors",)
"""The files of models whose headers are read without torch."""


def check_inputs(job: Job) -> None:
    """Raises DataError if the first samples of a task cannot be read, and ModelError if base or an expert is neither a
    model on this machine nor an id of the hub. Nothing is fetched."""
    with silent():
        for task in job.suite.members:
            if job.calib.source != GENERATE:
                check_source(task.name, "train", task.data)
            if scores_samples(job.evaluation):
                check_source(task.name, "test", scored_source(task))
        _check_models(job)


def check_source(task: str, split: Split, source: Source) -> None:
    """Raises DataError if the first samples of a split cannot be read, or if it has none."""
    if isinstance(source, CheckedSource):
        check_some(task, split, source.check_first(split))


def _check_models(job: Job) -> None:
    suite = job.suite
    roles = {"base": suite.base} | {f"expert of task {task.name}": task.expert for task in suite.members}
    base = None
    for role, source in roles.items():
        parts = [source] if Path(source).exists() else [part for part in source.partition("+")[::2] if part]
        places = [local_path(part, role, suite.root) for part in parts if not part.startswith(SCHEME)]
        if all(isinstance(place, Path) and (place.is_dir() or place.suffix in LAZY) for place in places):
            opened = open_member(job.family, source, role, suite.root, base)
            base = base or opened
