"""`vllm serve` as a process, with the command of the documentation. Oracle: transformers on the same checkpoint.

`make engines` runs this. vLLM computes in bfloat16 and needs a processor with AVX-512 for packed weights, so elsewhere
the checkpoint is dense.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from epmq_cli.checkpoint.engines import ENGINES
from epmq_cli.families import FAMILIES
from epmq_cli.families.family import load_model
from tests.engines.greedy import COUNT, PROMPT
from tests.engines.serving import asked, check_greedy, documented, served
from tests.evaluate.test_lm_eval import scores, write_tasks
from tests.helpers.engine_kinds import write_kind

PYTHON = os.environ.get("EPMQ_VLLM", "")
"""The Python of an environment with vLLM for CPUs."""
SIDE = Path(__file__).with_name("vllm_serve_side.py")
PACKED = "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs vLLM: make engines"),
]


def command_of(number: int, folder: Path) -> list[str]:
    """A command of the documentation for this folder; --enforce-eager, because compiling takes a C++ compiler."""
    program, *words = documented("vllm")[number]
    assert program == "vllm"
    replaced = [str(folder) if word == "runs/NAME/checkpoint" else word for word in words]
    assert str(folder) in replaced
    return [PYTHON, str(SIDE), *replaced, "--enforce-eager"]


def test_the_card_gives_the_commands_of_the_documentation() -> None:
    runners = ["", " --runner pooling"]
    given = [ENGINES["vllm_cpu"].command.format(folder="runs/NAME/checkpoint", runner=runner) for runner in runners]
    assert [" ".join(words) for words in documented("vllm")] == given


def test_completions_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_kind(tmp_path, "int4-64" if PACKED else "dense", "causal_lm")
    question = {"prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    with served(command_of(0, folder), tmp_path / "log") as address:
        answer = asked(f"{address}/v1/completions", {**question, "model": str(folder), "return_token_ids": True})
    [choice] = answer["choices"]
    assert len(choice["token_ids"]) == COUNT
    check_greedy(folder, PROMPT, choice["token_ids"], choice["logprobs"]["token_logprobs"], 0.1)


@pytest.mark.filterwarnings("ignore")  # created by the harness
def test_lm_evaluation_harness_scores_what_the_server_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM computes in bfloat16, which may change the answer to one of the seven questions."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_tasks(write_kind(tmp_path, "int4-64" if PACKED else "dense", "causal_lm"))
    with served(command_of(0, folder), tmp_path / "log") as address:
        found = scores(nn.Module(), folder, ["mini"], server=address)["mini/acc"]
    wanted = scores(load_model(FAMILIES["causal_lm"], folder, torch.device("cpu")), folder, ["mini"])["mini/acc"]
    assert (found.samples, found.value) == (7, pytest.approx(wanted.value, abs=1.5 / 7))


def test_embeddings_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_kind(tmp_path, "encoders" if PACKED else "encoders-dense", "bert")
    text = "red photo of a film"
    with served(command_of(1, folder), tmp_path / "log") as address:
        answer = asked(f"{address}/v1/embeddings", {"model": str(folder), "input": text})
    model: Any = load_model(FAMILIES["bert"], folder, torch.device("cpu"))
    with torch.inference_mode():
        inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        wanted = model(**inputs).last_hidden_state[0, 0]
    found = torch.tensor(answer["data"][0]["embedding"])
    torch.testing.assert_close(normalize(found, dim=-1), normalize(wanted, dim=-1), atol=0.02, rtol=0)
