"""Calibration data of language models. Oracles: the tokenizer alone, calibration without padding, and the experts' own
probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.families.processors import tokens
from epmq_cli.families.tasks.language_model import DRAWS
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.calibration import run_teachers
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config, walk
from tests.helpers.minihub import decoder_hub

APART = "+suite.each={packing: false}"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_hub(tmp_path_factory.mktemp("llama"), "llama")


def test_without_packing_each_sequence_is_a_document(hub: Path) -> None:
    job = make_job(config(hub, APART, "calib.samples=40"))
    batches = steps.calibration_batches(job, hub / "base")["first"]
    lines = (hub / "first_train.jsonl").read_text().splitlines()
    encode = tokens(hub / "base")
    wanted = [encode(json.loads(line)["text"])["input_ids"][0, :12].tolist() for line in lines]
    found = [ids[mask.bool()].tolist() for b in batches for ids, mask in zip(*b.values(), strict=True)]
    assert sorted(found) == sorted(ids for ids in wanted if len(ids) > 1)
    assert any(not batch["attention_mask"].all() for batch in batches)


def test_padding_is_not_calibrated_on(hub: Path) -> None:
    """One sample at a time needs no padding."""
    options = (APART, "calib.samples=12", "guidance=feature", "quant=none")
    padded, alone = (walk(hub, *options, f"calib.batch_size={size}").student.state_dict() for size in (12, 1))
    torch.testing.assert_close(padded, alone, rtol=1e-3, atol=1e-4)


def test_experts_write_text_by_their_own_probabilities(hub: Path) -> None:
    """Each token is the one whose share of the cumulated probabilities holds the drawn number."""
    job = make_job(config(hub, "calib.source=generate", "calib.samples=5", "calib.batch_size=3"))
    models, model, _ = steps.open_models(job)
    drawn = steps.calibration_batches(job, models.base.path)
    written = run_teachers(RunContext.of(job), model, models.source, drawn).batches
    assert [tuple(batch["input_ids"].shape) for batch in written["second"]] == [(3, 12), (2, 12)]
    assert all(list(batch) == ["input_ids"] for group in written.values() for batch in group)
    copy_into(model, models.source.model("second"))
    for batch, start in zip(written["second"], drawn["second"], strict=True):
        first = start["input_ids"].shape[1]
        with torch.inference_mode():
            chances = model(**batch).logits[:, first - 1 : -1].double().softmax(-1).cumsum(-1)
        after = chances.gather(2, batch["input_ids"][:, first:, None])[..., 0]
        before = torch.where(
            batch["input_ids"][:, first:] > 0,
            chances.gather(2, (batch["input_ids"][:, first:, None] - 1).clamp(min=0))[..., 0],
            0,
        )
        assert (before - 1e-5 < start[DRAWS]).all()
        assert (start[DRAWS] < after + 1e-5).all()
    texts = [batch["input_ids"].tolist() for group in written.values() for batch in group]
    assert len({str(ids) for text in texts for ids in text}) == 10


def test_text_is_the_same_for_any_number_of_samples_at_a_time(hub: Path) -> None:
    job = make_job(config(hub, "calib.source=generate", "calib.samples=4", "calib.batch_size=4"))
    models, model, _ = steps.open_models(job)
    (batch,) = steps.calibration_batches(job, models.base.path)["first"]
    whole, parts = (job.family.complete(model, batch, samples)["input_ids"] for samples in (4, 1))
    assert torch.equal(whole, parts)


def test_the_same_data_for_all_tasks_is_told(hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = "suite.tasks.second.data={train: '%s', test: '%s'}" % ((hub / "first_train.jsonl",) * 2)
    both = f"suite.tasks.first.data.test='{hub / 'first_train.jsonl'}'"
    for overrides, told in (((), False), ((same, both), True), ((same, both, "calib.source=generate"), False)):
        caplog.clear()
        steps.calibration_batches(make_job(config(hub, *overrides)), hub / "base")
        assert ("all tasks calibrate on the same data" in caplog.text) == told


@pytest.mark.parametrize("stride", [3, 12])
def test_windows_of_a_perplexity_may_overlap(stride: int, hub: Path) -> None:
    """Oracle: the loss of each token in the first window that has it."""
    job = make_job(config(hub, f"+suite.each={{stride: {stride}}}", "eval.batch_size=3"))
    models, model, _ = steps.open_models(job)
    task = steps.prepare_tasks(job, model, models)[0]
    ids = task.samples.inputs[0]
    losses, reached = [], 0
    for start in range(0, len(ids), stride):
        window = ids[start : start + 12]
        with torch.inference_mode():
            chances = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        losses += [-chances[i - 1, window[i]] for i in range(1, len(window)) if start + i >= reached]
        reached = start + len(window)
        if reached == len(ids):
            break
    found = RunContext.of(job).scorer.score(model, task)
    assert found.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert found.samples == len([*range(0, len(ids) - 12, stride)]) + 1 == task.steps


def test_a_stride_is_at_most_a_window(hub: Path) -> None:
    with pytest.raises(ConfigError, match=r"suite.tasks.first.stride must be a whole number in \[1, 12\], got 13"):
        make_job(config(hub, "+suite.each={stride: 13}"))


def test_other_models_write_no_text(bert_hub: Path) -> None:
    with pytest.raises(ConfigError, match="calib.source=generate lets language models write text, got models of fam"):
        make_job(config(bert_hub, "calib.source=generate"))
