"""Oracles: generation and loss of transformers, and a second scoring from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from epmq_cli.commands.eval import evaluate
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.families.tasks.generated_text import _number
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from tests.helpers.edited import copied
from tests.helpers.hubs import Scene, config, eval_config, run_in
from tests.helpers.minihub import Hub
from tests.helpers.tiers import first


@pytest.mark.slow
def test_epmq_eval_reproduces_the_scores_of_the_run(hub: Hub, tmp_path: Path) -> None:
    for kind in ("t5", "llama", "roberta"):
        folder = tmp_path / kind
        checkpoint = run_in(folder, hub(kind))
        with_eval = eval_config(checkpoint)
        (folder / "again").mkdir()
        evaluate(with_eval, folder / "again", [])
        first, again = (
            json.loads((path / "metrics.json").read_text())["scores"]["tasks"] for path in (folder, folder / "again")
        )
        assert {task: scores["quantized"] for task, scores in first.items()} == {
            task: scores["quantized"] for task, scores in again.items()
        }


def test_the_harness_is_refused_for_other_models_than_language_models(hub: Hub, tmp_path: Path) -> None:
    harness = ("eval=lm_eval", "eval.tasks=[arc_easy]")
    checkpoint = run_in(tmp_path, hub("roberta"), "eval.stages=[]")
    (tmp_path / "again").mkdir()
    with pytest.raises(ConfigError, match="eval=lm_eval scores language models only, got models of family roberta"):
        evaluate(eval_config(checkpoint, *harness), tmp_path / "again", [])
    with pytest.raises(ConfigError, match="eval=lm_eval scores language models only, got models of family roberta"):
        run_in(tmp_path / "run", hub("roberta"), *harness)


def test_answers_match_those_of_the_expert_up_to_their_end(hub: Hub) -> None:
    scene = Scene(hub("t5"))
    expert: Any = T5ForConditionalGeneration.from_pretrained(hub("t5") / "first").eval()
    for batch in scene.batches:
        ids, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"].bool()
        given = expert.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=10, do_sample=False
        )
        assert torch.equal(ids, given[:, :-1])
        for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
            end = row.index(2) if 2 in row else len(row)
            assert real == [place < end for place in range(len(row))]
            assert real[0]


EMPTY = "nothing"
"""The reference of an empty answer, which no source may have."""


def with_references(hub: Path, folder: Path) -> tuple[Path, list[list[str]]]:
    """The hub with test tables whose column `wanted` is what each task's expert writes in transformers, or EMPTY; and
    these columns."""
    made, columns = copied(hub, folder), []
    tokenizer = AutoTokenizer.from_pretrained(hub / "base")
    for task in ("first", "second"):
        expert: Any = T5ForConditionalGeneration.from_pretrained(hub / task).eval()
        path = made / f"{task}_test.tsv"
        texts = [line.partition("\t")[2] for line in path.read_text().splitlines()[1:]]
        given = expert.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_length=6, do_sample=False)
        columns.append([text or EMPTY for text in tokenizer.batch_decode(given, skip_special_tokens=True)])
        rows = [f"{answer}\t{text}" for answer, text in zip(columns[-1], texts, strict=True)]
        path.write_text("\n".join(["wanted\ttext", *rows]) + "\n")
    return made, columns


@pytest.mark.parametrize("metric", first(1, ["wer", "exact_match"]))
def test_written_answers_are_compared_with_a_column(metric: str, hub: Hub, tmp_path: Path) -> None:
    source, columns = with_references(hub("t5"), tmp_path / "hub")
    fields = {"classes": "null", "answer_length": "6", "data.answer": "wanted", "metric": metric}
    options = [f"++suite.tasks.{task}.{name}={value}" for task in ("first", "second") for name, value in fields.items()]
    run_in(tmp_path / "run", source, *options, "eval.stages=[experts]", "quant=rtn", "guidance=merged")
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())["scores"]
    for task, column in zip(("first", "second"), columns, strict=True):
        empty, all_words = column.count(EMPTY), sum(len(text.split()) for text in column)
        right = empty / all_words if metric == "wer" else 1 - empty / len(column)
        assert scores["tasks"][task]["experts"] == pytest.approx(right)
    batch = Scene(source, *options).batches[0]
    assert "room" not in batch
    assert batch["decoder_input_ids"].shape[1] == 5


WRONG = {
    "no texts": (
        ("metric=exact_match", "classes=null"),
        "metric is exact_match, which compares answers with texts; name",
    ),
    "texts and classes": (
        ("metric=exact_match", "data.answer=text"),
        "classes are for answers that name classes, got the metr",
    ),
    "texts as labels": (("data.answer=text",), "data.answer is text, a column of texts, and accuracy compares classes"),
    "one of two": (("metric=wer", "classes=null", "data.answer=text"), "must all have the metric wer if one has"),
    "too short": (("answer_length=1",), "answer_length must be a whole number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_metrics_and_data_must_fit(case: str, hub: Hub, tmp_path: Path) -> None:
    options, said = WRONG[case]
    with pytest.raises(ConfigError, match=said):
        run_in(tmp_path, hub("t5"), *(f"++suite.tasks.first.{option}" for option in options))


@pytest.mark.parametrize(("text", "number"), [("1.0", 1.0), ("positive", 0.0)])
def test_numbers_are_parsed_from_answers_and_others_score_zero(text: str, number: float) -> None:
    assert _number(text) == number


def test_perplexity_matches_the_loss_of_transformers(hub: Hub, tmp_path: Path) -> None:
    folder = hub("llama")
    run_in(tmp_path, folder, "eval.stages=[base]")
    found = json.loads((tmp_path / "metrics.json").read_text())["scores"]["tasks"]["first"]["base"]
    scene = Scene(folder)
    texts = [json.loads(line)["text"] for line in (folder / "first_test.jsonl").read_text().splitlines()]
    ids = scene.family.tasks.tokens(folder / "base", texts)
    losses = []
    for window in ids.split(12):
        if len(window) > 1:
            mean = scene.model(input_ids=window[None], labels=window[None]).loss
            losses += [mean] * (len(window) - 1)
    assert found == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


def test_an_expert_with_another_start_token_is_refused(hub: Hub, tmp_path: Path) -> None:
    source = copied(hub("t5"), tmp_path / "hub")
    path = source / "first" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "decoder_start_token_id": 1}))
    with pytest.raises(ModelError, match="decoder_start_token_id is 1 in its config and 0 in the base's"):
        steps.open_models(make_job(config(source)))
    path.write_text(json.dumps({name: value for name, value in settings.items() if "decoder_start" not in name}))
    steps.open_models(make_job(config(source)))  # the padding token, as in the training of T5


def test_answers_in_words_need_their_classes(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"suite.tasks.first.classes must be the answers in label order"):
        run_in(tmp_path, hub("t5"), "suite.tasks.first.classes=null")
