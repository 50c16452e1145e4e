"""Oracle: the labels are the expert's predictions in transformers, so the expert and the lone expert merged both
score 100."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.foreign.conftest import Conclude
from tests.end_to_end.foreign.jobs import Job, every_job, prepare, quick_jobs
from tests.end_to_end.foreign.judge import CommandResult, judge, problems, run_unquantized
from tests.end_to_end.foreign.kinds import KINDS
from tests.end_to_end.foreign.labels import LABELS
from tests.end_to_end.foreign.processors import PROCESSORS

ALL = every_job()
QUICK = quick_jobs(ALL)


def trial(job: Job) -> Any:
    return pytest.param(job, id=str(job), marks=[] if job in QUICK else [pytest.mark.slow])


def odd_scores(made: CommandResult, wanted: float) -> list[str]:
    """Stages whose scores differ from the expert's score in transformers."""
    scores = made.metrics["scores"]["tasks"]["task"]
    odd = [stage for stage in ("experts", "quantized") if not math.isclose(scores[stage], wanted, rel_tol=1e-3)]
    return [f"stage {stage} scores {scores[stage]:.3f}, not {wanted:.3f}" for stage in odd]


@pytest.mark.parametrize("job", [trial(job) for job in ALL])
def test_an_expert_scores_100_on_its_own_predictions(job: Job, tmp_path: Path, conclude: Conclude) -> None:
    user = prepare(job, tmp_path)

    def attempt(folder: Path) -> Iterable[str]:
        made = run_unquantized(user.suite, folder, "eval.stages=[experts,quantized]")
        found = problems(KINDS[job.kind], made, user.parameters, user.outputs, torch.float16)
        return [*odd_scores(made, user.score), *found]

    conclude(judge(attempt, tmp_path / "out", job.may_be_refused))


def test_the_fast_tier_has_every_value_of_every_axis() -> None:
    assert {job.labels for job in QUICK} > set(LABELS)
    assert {job.processor for job in QUICK} == set(PROCESSORS)
