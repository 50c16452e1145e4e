"""What the steps of a run share."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.evaluate.score import ScoreCache, Scorer, compute
from epmq_cli.pipeline.cached_steps import CachedSteps
from epmq_cli.pipeline.job import Job
from epmq_cli.pipeline.progress import RunProgress
from epmq_cli.report.stage_timer import Stages
from epmq_cli.runtime import distributed


@dataclass(frozen=True)
class RunContext:
    """A job and what its steps share.

    `folder`: the run folder. `micro`: chooses how many calibration samples run through a model at a time. `progress`:
    stores finished results. `cache`: if None, every result is computed.
    """

    job: Job
    folder: Path
    micro: MicroBatcher
    scorer: Scorer
    stages: Stages
    progress: RunProgress = field(default_factory=RunProgress)
    cache: CachedSteps | None = None

    @classmethod
    def of(cls, job: Job, folder: Path | None = None) -> RunContext:
        """The context of a job that starts, without progress and cache. `folder`: by default the system's temporary
        folder."""
        scorer, stages = Scorer(job.evaluation, job.family, job.device), Stages(job.device)
        return cls(job, folder or Path(tempfile.gettempdir()), _calibration_batcher(job), scorer, stages)

    def resumed(self, progress: RunProgress, cache: CachedSteps) -> RunContext:
        """The context with progress and cache. The micro-batchers continue the progress's counts of halvings, and store
        new ones there."""
        for name, micro in (("batches_halved", self.micro), ("eval_batches_halved", self.scorer.micro)):
            micro.halved, micro.keep = progress.count(name), partial(progress.keep_count, name)
        return replace(self, progress=progress, cache=cache)

    def score_cache(self, stage: str) -> ScoreCache:
        """The cache of a stage's scores, or `compute` without a cache."""
        return compute if self.cache is None else self.cache.score_cache(stage)


def _calibration_batcher(job: Job) -> MicroBatcher:
    """Starts with whole calibration batches. With several processes it does not retry, because they would have to halve
    the micro-batch together."""
    return MicroBatcher(
        min(job.calib.batch_size, job.calib.samples),
        "calibration",
        "lower max_length of the suite's tasks or calib.memory, use a device with more memory, or calib.student=disk",
        retries=distributed.world_size() == 1,
    )
