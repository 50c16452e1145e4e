"""Oracle: transformers' own hidden states of the same batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.pipeline import steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.refine.hidden_states import captured, chosen
from tests.helpers.hubs import config
from tests.helpers.minihub import hub_of
from tests.helpers.tiers import first


@pytest.mark.parametrize("kind", first(1, ("bert", "clip", "llama", "t5", "vit", "roberta", "modernbert", "deberta")))
def test_hidden_states_are_those_of_real_tokens(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    job = make_job(config(hub_of(kind, request, tmp_path)))
    models, model, _ = steps.open_models(job)
    batch = next(iter(steps.calibration_batches(job, models.base.path).values()))[0]
    if job.family.answers:
        batch = job.family.complete(model, batch, 4)
    numbers = chosen(None, job.family, model)
    with torch.no_grad(), captured(job.family, model, batch, numbers) as found:
        job.family.features(model, batch)
    assert sorted(found) == list(numbers)
    places = [(block, stack) for stack in job.family.stacks(model) for block in stack.blocks]
    for number, (block, stack) in enumerate(places):
        mask, samples = stack.mask(batch), len(next(iter(batch.values())))
        last = block is stack.blocks[-1] and stack.lone_token is not None
        assert found[number].ndim == 2
        if last:
            assert len(found[number]) == samples
        elif mask is not None:
            assert len(found[number]) == int(mask.sum())
    with pytest.raises(
        ConfigError, match=rf"refine.hidden_blocks must hold numbers from 0 to {len(numbers) - 1}, got 9"
    ):
        chosen([9], job.family, model)


def test_hidden_states_are_those_of_transformers(bert_hub: Path) -> None:
    job = make_job(config(bert_hub))
    models, model, _ = steps.open_models(job)
    batch = next(iter(steps.calibration_batches(job, models.base.path).values()))[0]
    with torch.no_grad():
        with captured(job.family, model, batch, [0]) as found:
            job.family.features(model, batch)
        wanted = model(**batch, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found[0], wanted[batch["attention_mask"].bool()])
