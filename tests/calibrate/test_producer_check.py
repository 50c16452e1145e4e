"""Oracles: the producers that families name pass; a producer that feeds something else, or another layer, is
refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from epmq_cli.calibrate.producer_check import check_producers
from epmq_cli.errors import ConfigError
from epmq_cli.families.structure import Linears, Section, Stack
from epmq_cli.pipeline import steps
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config


@pytest.mark.parametrize("wrong", [None, "layer_norm1", "self_attn.q_proj"])
def test_wrong_producers_are_refused(wrong: str | None, clip_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(config(clip_hub))
    models, model, _ = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    stacks = job.family.stacks(model)

    def renamed(block: Section) -> Section:
        own = [
            replace(step, producer=wrong)
            if isinstance(step, Linears) and step.names == ("self_attn.out_proj",)
            else step
            for step in block.steps
        ]
        return replace(block, steps=tuple(own))

    changed: list[Stack] = [replace(stack, blocks=[renamed(block) for block in stack.blocks]) for stack in stacks]
    if wrong is None:
        check_producers(model, job.family, batches)
        return
    monkeypatch.setattr(job.family, "stacks", lambda *_: changed)
    with pytest.raises(ConfigError, match=rf"cannot be folded into .*{wrong} of CLIPModel; use quant=gptq"):
        check_producers(model, job.family, batches)
