"""Calibration data of language models. Oracles: the tokenizer alone, calibration without padding, and the experts' own
probabilities."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from epmq_cli.calibrate.activations.hidden_state import enter
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.data.batching import ANSWERS
from epmq_cli.data.chats import Chat
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.families.causal_lm import CAUSAL_LM
from epmq_cli.families.processors import tokens
from epmq_cli.families.tasks.language_model import DRAWS, LanguageModel
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.calibration import run_teachers
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job
from tests.helpers.architectures import TAKEN, built
from tests.helpers.hubs import config, walk
from tests.helpers.minihub import decoder_files, decoder_hub
from tests.helpers.talks import talking
from tests.helpers.tiers import slow

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


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_padding_is_not_calibrated_on(kind: str, hub: Path, tmp_path: Path) -> None:
    """One sample at a time needs no padding. OPT flattens samples and tokens."""
    if kind == "opt":
        hub = decoder_files(tmp_path, built(TAKEN["opt"]))
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


@pytest.mark.parametrize("apart", [(), slow(((APART,),))])
def test_prompts_weigh_less_than_answers(apart: tuple[str, ...], tmp_path: Path) -> None:
    options = (*apart, "guidance=expert", "guidance.safe=false", "quant=none", "calib.samples=12", "calib.batch_size=5")
    folder = talking(tmp_path / "hub")
    job = make_job(config(folder, *options, "guidance.prompt_weight=0.25"))
    batches = steps.calibration_batches(job, folder / "base")["first"]
    model = steps.open_models(job)[1]
    states = enter(model, job.family, job.family.stacks(model)[0], batches, ActivationStore(math.inf))
    assert {mark for batch in batches for mark in batch[ANSWERS].flatten().tolist()} == {0, 1}
    for state, batch in zip(states, batches, strict=True):
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        wanted = torch.where(batch[ANSWERS][real] == 1, 1.0, 0.25)
        weights = state.weights(None, job.guidance)
        assert weights is not None
        assert torch.equal(weights, wanted)
    alike, less = (
        walk(folder, *options, f"guidance.prompt_weight={weight}").walked.records for weight in ("1", "0.25")
    )
    assert [record.tokens for record in alike] == [record.tokens for record in less]
    assert all(one.loss_merged != other.loss_merged for one, other in zip(alike, less, strict=True))


def test_scored_data_of_another_kind_is_told(hub: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = talking(tmp_path / "hub")
    mixed = f"suite.tasks.first.data.test='{hub / 'first_test.jsonl'}'"
    for overrides, told in (((), False), ((mixed,), True)):
        caplog.clear()
        job = make_job(config(folder, *overrides))
        models, model, _ = steps.open_models(job)
        steps.calibration_batches(job, models.base.path, None, steps.prepare_tasks(job, model, models))
        found = "task first calibrates on conversations and is scored on texts" in caplog.text
        assert found == told
        assert "task second calibrates" not in caplog.text


def answered(folder: Path) -> tuple[Tensor, Tensor]:
    """The tokens of the test conversations of a task and their labels, -100 where they are not of an answer or of the
    token behind it: (tokens,)."""
    tokenizer, ids, labels = AutoTokenizer.from_pretrained(folder / "base"), list[int](), list[int]()
    for line in (folder / "first_test.jsonl").read_text().splitlines():
        question, answer = (message["content"] for message in json.loads(line)["text"])
        before = f"user {question} {tokenizer.eos_token}assistant "
        whole = tokenizer(f"{before}{answer} {tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        asked = len(tokenizer(before.strip(), add_special_tokens=False)["input_ids"])
        ids, labels = ids + whole, labels + [-100] * asked + whole[asked:]
    return torch.tensor(ids), torch.tensor(labels)


@pytest.mark.parametrize("stride", [5, 12])
def test_perplexity_of_answers_is_the_loss_of_transformers(stride: int, tmp_path: Path) -> None:
    """Oracle: `labels` of -100 on prompts, and on tokens of earlier windows."""
    folder = talking(tmp_path / "hub")
    job = make_job(config(folder, f"+suite.each={{assistant_only_loss: true, stride: {stride}}}", "eval.batch_size=3"))
    models, model, _ = steps.open_models(job)
    task = steps.prepare_tasks(job, model, models)[0]
    ids, wanted = answered(folder)
    total, count, reached, used = 0.0, 0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + 12, len(ids))
        labels = wanted[start:end].clone()
        labels[: max(0, reached - start)] = -100
        predicted, reached = int((labels[1:] != -100).sum()), end
        if predicted:
            with torch.inference_mode():
                loss = model(input_ids=ids[None, start:end], labels=labels[None]).loss
            total, count, used = total + predicted * float(loss), count + predicted, used + 1
        if end == len(ids):
            break
    found = RunContext.of(job).scorer.score(model, task)
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.samples == used
    assert found.error is not None


def test_only_answers_count_where_there_are_some(hub: Path, bert_hub: Path, tmp_path: Path) -> None:
    option = "+suite.each={assistant_only_loss: true}"
    with pytest.raises(ConfigError, match=r"first.assistant_only_loss is for decoders, .* got models of family bert"):
        make_job(config(bert_hub, option))
    silent = talking(tmp_path / "silent", role="user")
    for folder, kind in ((hub, "texts"), (silent, "conversations without an answer of the assistant")):
        job = make_job(config(folder, option))
        models, model, _ = steps.open_models(job)
        with pytest.raises(DataError, match=f"task first: its test samples are {kind}, and .* or set it to false"):
            steps.prepare_tasks(job, model, models)


def test_sources_of_conversations_and_texts_are_all_read(hub: Path, tmp_path: Path) -> None:
    """Texts among conversations count whole."""
    language = CAUSAL_LM.tasks
    assert isinstance(language, LanguageModel)
    folder = talking(tmp_path / "hub")
    talk = json.loads((folder / "first_test.jsonl").read_text().splitlines()[0])["text"]
    text = json.loads((hub / "first_test.jsonl").read_text().splitlines()[0])["text"]
    chat = Chat(talk, "row 1")
    parts = [language.each(folder / "base", [part], answers=True)[0] for part in (text, chat, text)]
    assert torch.equal(language.tokens(folder / "base", [text, chat, text], answers=True), torch.cat(parts))
    assert [set(part[:, 1].tolist()) for part in parts] == [{1}, {0, 1}, {1}]


def test_prompts_need_conversations_with_answers(hub: Path, bert_hub: Path, tmp_path: Path) -> None:
    option = "guidance.prompt_weight=0.5"
    with pytest.raises(ConfigError, match=r"prompt_weight=0.5 needs language models and data with conversations"):
        make_job(config(bert_hub, option))
    with pytest.raises(DataError, match=r"no task has both .*: first has texts, not conversations, second has texts"):
        steps.calibration_batches(make_job(config(hub, option)), hub / "base")
    silent = talking(tmp_path / "silent", role="user")
    with pytest.raises(DataError, match=r"first has conversations without an answer .* set guidance.prompt_weight=1"):
        steps.calibration_batches(make_job(config(silent, option)), silent / "base")


def test_tokens_of_texts_count_alike_beside_conversations(
    hub: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the batches and weights without the option; conversations without answers are told."""
    folder, silent = talking(tmp_path / "hub"), talking(tmp_path / "silent", role="user")
    options = ("guidance=expert", "guidance.safe=false", "quant=none")
    for other, told in ((hub, False), (silent, True)):
        caplog.clear()
        data = f"suite.tasks.second.data.train='{other / 'second_train.jsonl'}'"
        less, alike = (
            walk(folder, *options, data, f"guidance.prompt_weight={weight}").walked.records for weight in ("0.25", "1")
        )
        assert all(one.loss_merged != other.loss_merged for one, other in zip(alike, less, strict=True))
        first, second = (
            steps.calibration_batches(make_job(config(folder, *options, data, option)), folder / "base")
            for option in ("guidance.prompt_weight=0.25", "guidance.prompt_weight=1")
        )
        assert all(ANSWERS in batch for batch in first["first"])
        for one, same in zip(first["second"], second["second"], strict=True):
            assert list(one) == list(same)
            assert torch.equal(one["input_ids"], same["input_ids"])
        assert ("task second calibrates on conversations without an answer" in caplog.text) == told
