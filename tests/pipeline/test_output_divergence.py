"""Oracles: the KL divergence of the logits, and the losses and choices of a run without it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from epmq_cli.data.held_out import filled, hold_out
from epmq_cli.errors import ConfigError
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.output_divergence import keep_outputs
from tests.helpers.hubs import config, run_in
from tests.helpers.tiers import first


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_the_divergence_is_that_of_the_logits_on_held_out_samples(name: str, request: pytest.FixtureRequest) -> None:
    job = make_job(config(request.getfixturevalue(f"{name}_hub")))
    models, model, _ = steps.open_models(job)
    batches, tasks = steps.calibration_batches(job, models.base.path), steps.prepare_tasks(job, model, models)
    held = filled(hold_out(batches)[1])

    def chances() -> list[torch.Tensor]:
        rows = [guide.features(job.family, model, held[task.name]) for task in tasks]
        logits = [job.family.logits(model, own, task.head) for own, task in zip(rows, tasks, strict=True)]
        return [own.double().log_softmax(-1) for own in logits]

    with torch.inference_mode():
        before, divergence = chances(), keep_outputs(job.family, model, batches, tasks, 3)
        assert divergence() == pytest.approx(0, abs=1e-9)
        for block in job.family.blocks(model):
            block.module.get_parameter(f"{block.linears[0]}.weight").mul_(1.5)
        means = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before, chances(), strict=True)]
        assert divergence() == pytest.approx(sum(means) / len(means), rel=1e-3)


def test_losses_of_a_run_are_weighed_by_group(bert_hub: Path, tmp_path: Path) -> None:
    tables = []
    for way in ("objective", "divergence"):
        run_in(tmp_path / way, bert_hub, "bits=2.5", f"quant.sensitivity={way}", "eval.stages=[]")
        tables.append(json.loads((tmp_path / way / "metrics.json").read_text())["sensitivity"])
    factors = []
    for plain, weighed in zip(*tables, strict=True):
        low, high = (
            own["loss"] / other["loss"] for own, other in zip(weighed["candidates"], plain["candidates"], strict=True)
        )
        assert low == pytest.approx(high, rel=1e-6)
        factors.append(low)
    assert min(factors) >= 0
    assert max(factors) > 2 * min(factors)


def test_one_format_leaves_nothing_to_choose(bert_hub: Path) -> None:
    message = "quant.sensitivity=divergence chooses formats, got one format for all linears; use an average such as"
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_job(config(bert_hub, "quant.sensitivity=divergence"))
