"""Oracles: the log-likelihoods of the model itself, and results written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from epmq_cli.config.schema import Harness
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.errors import ConfigError
from epmq_cli.evaluate.lm_eval import chosen, harness_scores
from epmq_cli.evaluate.metrics import Score
from tests.helpers.minihub import decoder_hub

TASK = """task: mini
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [red, blue]
doc_to_target: label
metric_list:
  - metric: acc
"""
NAMES = ("mini", "tagged", "like_one", "like_two", "grouped")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = decoder_hub(tmp_path_factory.mktemp("llama"), "llama")
    texts = ["a photo of", "it is", "good film not", "very bad", "the", "is it", "of a film"]
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    for name in NAMES:
        text = TASK.format(file=folder / "rows.jsonl").replace("task: mini", f"task: {name}\ntag: of_{name}")
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    (folder / "tasks" / "group.yaml").write_text("group: bare\ntask: [grouped]\n")
    return folder


def scores(
    model: nn.Module, hub: Path, tasks: list[str], samples: int | None = None, chats: bool = False
) -> dict[str, Score]:
    """The harness's scores on tasks of the hub."""
    options = {"stages": (), "kernel": "dequantize", "shots": None, "include_path": str(hub / "tasks")}
    evaluation = Harness(batch_size=4, samples=samples, tasks=tasks, chat_template=chats, **options)
    return harness_scores(model, hub / "base", CPU, evaluation, MicroBatcher(4, "scoring", "lower eval.batch_size"))


@pytest.mark.filterwarnings("ignore")  # created by the harness
@pytest.mark.slow
def test_the_score_of_a_task_is_the_share_of_the_likelier_choices(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(hub / "cache"))
    model = AutoModelForCausalLM.from_pretrained(hub / "base").eval()
    found = scores(model, hub, ["mini"], 6)
    tokenizer, right = AutoTokenizer.from_pretrained(hub / "base"), 0
    for line in (hub / "rows.jsonl").read_text().splitlines()[:6]:
        row = json.loads(line)
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids).logits[0, -1]
        choices = [tokenizer.convert_tokens_to_ids(word) for word in ("red", "blue")]
        right += int(logits[choices].argmax()) == row["label"]
    share = right / 6
    assert found == {"mini/acc": (pytest.approx(share), pytest.approx(math.sqrt(share * (1 - share) / 6)), 6)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_chat_template_writes_the_prompts(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness puts what the template writes in front of both choices."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(hub / "cache"))
    model, seen = AutoModelForCausalLM.from_pretrained(hub / "base").eval(), list[str]()
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template"):
        scores(model, hub, ["mini"], chats=True)
    (hub / "base" / "chat_template.jinja").write_text("{% for m in messages %}good {{ m['content'] }} bad {% endfor %}")
    tokenizer = AutoTokenizer.from_pretrained(hub / "base")
    model.register_forward_pre_hook(
        lambda _, args, options: seen.extend(map(tokenizer.decode, args[0] if args else options["input_ids"])),
        with_kwargs=True,
    )
    try:
        assert scores(model, hub, ["mini"], 6, chats=True)["mini/acc"].samples == 6
    finally:
        (hub / "base" / "chat_template.jinja").unlink()
    assert any("good a photo of bad" in text for text in seen)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_an_unknown_task_is_refused(hub: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hub / "base")
    with pytest.raises(ConfigError, match="eval.tasks names mimi, which lm-evaluation-harness does not know"):
        scores(model, hub, ["mimi"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_tag_a_pattern_and_a_group_without_a_score_give_the_scores_of_their_tasks(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(hub / "cache"))
    model = AutoModelForCausalLM.from_pretrained(hub / "base").eval()
    asked = ["mini", "of_tagged", "like_*", "bare"]
    found = scores(model, hub, asked)
    assert found == dict.fromkeys([f"{name}/acc" for name in NAMES], found["mini/acc"])


def test_the_preferred_metric_is_used() -> None:
    several = {"alias": "a", "acc,none": 0.5, "acc_norm,none": 0.25, "acc_stderr,none": 0.1}
    odd = {"bleu,none": 0.125, "bleu_stderr,none": "N/A"}
    found = chosen(["a", "b"], {"a": several, "b": odd}, {"a": 12, "b": 9})
    assert found == {"a/acc_norm": (0.25, pytest.approx(0.125), 12), "b/bleu": (0.125, None, 9)}


def test_the_first_filter_of_a_metric_is_used() -> None:
    filters = {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    assert chosen(["gsm8k"], {"gsm8k": filters}, {}) == {"gsm8k/exact_match": (0.25, None, None)}
