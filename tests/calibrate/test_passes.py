"""Oracle: the walks run one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from epmq_cli.calibrate.block_refinement import Chunks
from epmq_cli.calibrate.passes import run_passes
from epmq_cli.calibrate.student import Student
from epmq_cli.calibrate.walk import Walk
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.quantize.none import NoQuantizer
from tests.helpers.hubs import config
from tests.helpers.tiers import first


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_each_pass_is_anchored_at_the_one_before_and_only_the_last_is_quantized(
    name: str, request: pytest.FixtureRequest
) -> None:
    job = make_job(config(request.getfixturevalue(f"{name}_hub"), "guidance=feature", "guidance.sweeps=3"))
    models, model, dtype = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    merged = LazyMerge(models.source, job.merge, dtype)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()} | dict(merged)
    copy_into(model, start)
    student = Student(model, job.family, guide.references(job, model, merged), job.guidance, dtype)
    with torch.inference_mode():
        found = run_passes(student, Chunks(batches), job.quantizer)
        swept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        copy_into(model, start)
        results = []
        for quantizer in (NoQuantizer(), NoQuantizer(), job.quantizer):
            results.append(Walk(student, Chunks(batches), lambda _, q=quantizer: q).run())
            student = replace(student, guidance=replace(student.guidance, rho=1))
    assert all(torch.equal(tensor, swept[name]) for name, tensor in model.state_dict().items())
    assert found.records == results[-1].records
    assert all(math.isfinite(record.loss) for record in found.records)
