"""Oracle: the operations of one linear, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from epmq_cli.inspection.operations import CALLS, Operations
from epmq_cli.inspection.refinement_work import ADAM_CALLS, COPY_CALLS, MUON_CALLS, refinement_work
from epmq_cli.inspection.work import Group, Work
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config

WORK = Work(
    blocks=[[Group(4, 8, False, 1)]],
    dense=[],
    parameters=32,
    tensors=1,
    quantized=32,
    largest_block=32,
    tokens=400,
    batches=10,
    samples=200,
    samples_bytes=0,
    longest=0,
    tests=0,
    vocabulary=0,
)
"""Two tasks of 100 samples of two tokens, and one linear from 4 inputs to 8 outputs: 64 operations a token."""


def test_epochs_go_forward_and_backward_and_score_what_is_held_out(bert_hub: Path) -> None:
    options = ("refine=distill", "refine.views=1", "refine.epochs=3", "refine.batch_size=5", "refine.optimizer=adamw")
    job = make_job(config(bert_hub, "calib.batch_size=20", *options))
    done = refinement_work(job, WORK, Operations(), 1)
    passes = 1 + 3 * (0.8 * 3 + 0.2)
    assert done.single == pytest.approx(passes * 400 * 64)
    steps = 3 * 16  # 80 samples of each task, 5 at a time
    assert done.calls == pytest.approx(passes * 40 * CALLS + steps * (ADAM_CALLS + COPY_CALLS + 2))
    muon = refinement_work(replace(job, refine=replace(job.refine, optimizer="muon")), WORK, Operations(), 1)
    assert muon.single - done.single == pytest.approx(steps * 5 * (4 * 4**2 * 8 + 2 * 4**3))
    assert muon.calls - done.calls == pytest.approx(steps * (MUON_CALLS - ADAM_CALLS))


def test_without_training_there_is_none(bert_hub: Path) -> None:
    assert refinement_work(make_job(config(bert_hub)), WORK, Operations(single=7), 1) == Operations()
