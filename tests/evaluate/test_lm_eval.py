"""Oracles: the log-likelihoods of the model itself, and results written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from epmq_cli.config.schema import Harness
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.errors import ConfigError
from epmq_cli.evaluate.lm_eval import chosen, harness_scores
from epmq_cli.evaluate.metrics import Score
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config
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
    return write_tasks(decoder_hub(tmp_path_factory.mktemp("llama"), "llama"))


def write_tasks(folder: Path) -> Path:
    """Writes tasks of the harness, with their rows, into a folder, and returns it."""
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
    model: nn.Module,
    hub: Path,
    tasks: list[str],
    samples: int | None = None,
    chats: bool = False,
    server: str | None = None,
) -> dict[str, Score]:
    """The harness's scores on tasks of the hub."""
    options = {
        "stages": (),
        "kernel": "dequantize",
        "round_inputs": True,
        "shots": None,
        "include_path": str(hub / "tasks"),
    }
    evaluation = Harness(batch_size=4, samples=samples, tasks=tasks, chat_template=chats, server=server, **options)
    folder = hub / "base" if (hub / "base").is_dir() else hub
    return harness_scores(model, folder, CPU, evaluation, MicroBatcher(4, "scoring", "lower eval.batch_size"))


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


@contextmanager
def served(model: Any) -> Iterator[tuple[str, list[list[int]]]]:
    """The address of a server that gives the log-probabilities of prompts, as that of vLLM does, and its prompts."""
    prompts: list[list[int]] = []

    def choice(index: int, ids: list[int]) -> dict[str, Any]:
        found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [float(row[token]) for row, token in zip(found, ids[1:], strict=False)]
        top = [{"best": float(row.max())} for row in found]
        values = {"token_logprobs": [None, *own, 0.0], "top_logprobs": [None, *top]}
        return {"index": index, "logprobs": values, "text": ""}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"data": [{"id": "mine", "max_model_len": 32}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (asked["model"], asked["echo"], self.path) == ("mine", True, "/v1/completions")
            prompts.extend(asked["prompt"])
            self.reply({"choices": [choice(*pair) for pair in enumerate(asked["prompt"])]})

        def reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *ignored: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", prompts
        server.shutdown()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_server_of_the_model_gives_its_scores(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(hub / "cache"))
    model = AutoModelForCausalLM.from_pretrained(hub / "base").eval()
    with served(model) as (address, prompts):
        assert scores(nn.Module(), hub, ["mini"], server=address) == scores(model, hub, ["mini"])
        assert len(prompts) == 14
    with pytest.raises(ConfigError, match=f"eval.server={address} does not answer with a model .*; start a server"):
        scores(nn.Module(), hub, ["mini"], server=address)


def test_a_run_has_no_server_to_ask(hub: Path) -> None:
    options = ("eval=lm_eval", "eval.tasks=[mini]")
    with pytest.raises(ConfigError, match="eval.server is an option of epmq eval"):
        make_job(config(hub, *options, "eval.server=http://localhost:8000"))
    with pytest.raises(ConfigError, match="eval.server must be an address such as http://localhost:8000, got 'host'"):
        make_job(config(hub, *options, "eval.server=host"))


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
