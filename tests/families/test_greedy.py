"""Answers of decoders. Oracle: `generate` of transformers, one prompt at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from epmq_cli.commands.eval import evaluate
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.families.tasks.greedy import greedy_answers, left_padded
from tests.helpers.architectures import SEEING, TAKEN, built
from tests.helpers.edited import copied
from tests.helpers.hubs import eval_config, run_in
from tests.helpers.minihub import decoder_hub
from tests.helpers.tiers import only, slow

LENGTH = 6
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
QUICK = ("quant=rtn", "guidance=merged")


KINDS = [kind for kind in (*TAKEN, *SEEING) if kind != "llama4"]
"""Without one that transformers cannot run alone (epmq_cli/models/llama4.py)."""


@pytest.mark.parametrize("kind", only(("qwen2", "gpt2"), KINDS))
def test_prompts_of_different_lengths_are_answered_as_each_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = built({**TAKEN, **SEEING}[kind]).eval()
    size = model.config.get_text_config().vocab_size
    prompts = [torch.randint(9, size, (length,)) for length in (3, 7, 12)]
    with torch.inference_mode():
        found = greedy_answers(model, left_padded(prompts), LENGTH, {2})
    for ids, answer in zip(prompts, found, strict=True):
        alone: Any = model.generate(
            input_ids=ids[None], max_new_tokens=LENGTH, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        wanted = alone[0, len(ids) :].tolist()
        assert answer.tolist() == wanted + [2] * (LENGTH - len(wanted))


def test_an_answer_ends_with_its_first_end_token() -> None:
    class Counting(torch.nn.Module):
        """Writes the number after the last token."""

        def forward(self, input_ids: torch.Tensor, attention_mask: Any, past_key_values: Any, use_cache: bool) -> Any:
            logits = torch.nn.functional.one_hot(input_ids + 1, 20).float()
            return type("Output", (), {"logits": logits, "past_key_values": None})

    batch = left_padded([torch.tensor([1, 2]), torch.tensor([7])])
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert greedy_answers(Counting(), batch, 5, {5, 9}).tolist() == [[3, 4, 5, 5, 5], [8, 9, 9, 9, 9]]


Asked = tuple[Path, dict[str, dict[str, float]]]
"""A hub, and the scores of its experts by metric and task."""


def questions(folder: Path) -> Asked:
    """Test conversations end with what the task's expert writes in transformers, every third with another word. The
    column `wanted` has the same answers."""
    decoder_hub(folder, "llama")
    (folder / "base" / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    scores: dict[str, dict[str, float]] = {"exact_match": {}, "wer": {}}
    for task in ("first", "second"):
        expert: Any = AutoModelForCausalLM.from_pretrained(folder / task).eval()
        for split in ("train", "test"):
            path, rows = folder / f"{task}_{split}.jsonl", []
            texts = [" ".join(json.loads(line)["text"].split()[:8]) for line in path.read_text().splitlines()]
            for number, text in enumerate(texts):
                asked = [{"role": "user", "content": text}]
                ids = tokenizer.apply_chat_template(
                    asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
                given = expert.generate(**ids, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
                answer = tokenizer.decode(given[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
                wanted = answer if answer and number % 3 else "nothing"
                said = [*asked, {"role": "assistant", "content": wanted}]
                rows.append({"messages": said, "asked": asked, "wanted": wanted, "given": answer})
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        wrong = [row for row in rows if row["wanted"] != row["given"]]
        scores["exact_match"][task] = 1 - len(wrong) / len(rows)
        edits = sum(max(1, len(row["given"].split())) for row in wrong)  # from or to one word
        scores["wer"][task] = edits / sum(len(row["wanted"].split()) for row in rows)
    return folder, scores


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return questions(tmp_path_factory.mktemp("asked"))


def options(source: str, metric: str = "exact_match") -> list[str]:
    """The options that score answers of conversations, or of a column."""
    found = [f"+suite.each={{answer_length: {LENGTH}}}"]
    for task in ("first", "second"):
        found += [f"++suite.tasks.{task}.max_length=32", f"++suite.tasks.{task}.metric={metric}"]
        if source == "column":
            table = {"_target_": "epmq_cli.data.table.Table", "text": "asked", "answer": "wanted"}
            found += [f"++suite.tasks.{task}.data.{name}={value}" for name, value in table.items()]
    return found


def metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a run."""
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


@pytest.mark.parametrize(
    ("source", "metric"), [("messages", "exact_match"), slow(("column", "exact_match")), slow(("messages", "wer"))]
)
def test_answers_are_compared_with_the_last_message_or_a_column(
    source: str, metric: str, asked: Asked, tmp_path: Path
) -> None:
    hub, scores = asked
    run_in(tmp_path, hub, *options(source, metric), "eval.stages=[experts,merged,quantized]", *QUICK)
    found = metrics(tmp_path)
    assert min(scores["exact_match"].values()) > 0
    assert {task: own["experts"] for task, own in found["scores"]["tasks"].items()} == pytest.approx(scores[metric])
    assert found["agreement"]["first"]["merged"]["kl"] > 0


@pytest.mark.slow
def test_checkpoints_answer_as_the_run(asked: Asked, tmp_path: Path) -> None:
    """Dequantized, and packed with the kernels of the engine."""
    checkpoint = run_in(tmp_path / "run", asked[0], *options("messages"), "group_size=32", *QUICK)
    scores = metrics(tmp_path / "run")["scores"]["tasks"]
    for kernel in ("dequantize", "exact", "int4"):
        (tmp_path / kernel).mkdir()
        evaluate(eval_config(checkpoint, f"eval.kernel={kernel}"), tmp_path / kernel, [])
        again = metrics(tmp_path / kernel)["scores"]["tasks"]
        noise = 0.2 if kernel == "int4" else 0  # bfloat16 tips answers of random models
        for task, own in scores.items():
            assert again[task]["quantized"] == pytest.approx(own["quantized"], abs=noise)


WRONG: dict[str, tuple[tuple[str, ...], type[Exception], str]] = {
    "mixed": (
        ("++suite.tasks.first.metric=exact_match", "++suite.tasks.second.metric=perplexity"),
        ConfigError,
        "must all have the metric perplexity if one has",
    ),
    "positions": (
        ("++suite.tasks.first.answer_length=60", "++suite.tasks.first.max_length=32"),
        ConfigError,
        "max_length and answer_length together must be at most 64, .* got 92",
    ),
    "long": (("++suite.tasks.second.max_length=4",), DataError, "longest prompt has .* tokens, more than"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_scored_is_told(case: str, asked: Asked, tmp_path: Path) -> None:
    wrong, kind, said = WRONG[case]
    with pytest.raises(kind, match=said):
        run_in(tmp_path, asked[0], *options("messages"), *wrong, "eval.stages=[base]", *QUICK)


@pytest.mark.parametrize(("kept", "said"), [(1, "row 1 does not end with an answer"), (0, "are texts, not convers")])
def test_answers_need_texts_to_compare_with(kept: int, said: str, asked: Asked, tmp_path: Path) -> None:
    hub = copied(asked[0], tmp_path / "hub")
    path = hub / "first_test.jsonl"
    talks = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    rows = [{"messages": talk[:1]} if kept else {"text": talk[0]["content"]} for talk in talks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=said):
        run_in(tmp_path / "run", hub, *options("messages"), "eval.stages=[base]", *QUICK)
