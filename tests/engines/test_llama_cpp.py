"""llama.cpp reads the files of `epmq export`. Oracle: transformers on the checkpoint. `make engines` runs this."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import epmq_cli
from epmq_cli.checkpoint.gguf.write import GgufFile
from epmq_cli.commands.export import main
from tests.engines.greedy import PROMPT, by_transformers
from tests.engines.serving import asked, check_greedy, documented, served
from tests.helpers.byte_level import MODELS, write_decoder

PYTHON = os.environ.get("EPMQ_LLAMA_CPP", "")
"""The Python of an environment with xllamacpp."""
COUNT = 12
ROUNDING = {"gelu": 3e-3, "silu": 1e-4}
"""The largest difference of a log-probability by the activation; llama.cpp has a table of GELU in float16."""
TEXT = "the lives of 12 people,  a story é 語!"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs llama.cpp: make engines"),
]


def by_llama_cpp(file: Path, prompt: list[int] | str = PROMPT) -> list[tuple[int, float]]:
    """The most likely tokens after the prompt, with their log-probabilities."""
    side = Path(__file__).with_name("llama_cpp_side.py")
    command = [PYTHON, str(side), str(file), json.dumps(prompt), str(COUNT)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [(number, value) for number, value in json.loads(done.stdout.splitlines()[-1])]


def wanted(checkpoint: Path, prompt: list[int] = PROMPT) -> list[tuple[int, float]]:
    """The same of transformers; llama.cpp is asked to ignore the end."""
    return by_transformers(checkpoint, prompt, COUNT, AutoTokenizer.from_pretrained(checkpoint).eos_token_id)


@pytest.mark.parametrize("kind", MODELS)
def test_dense_files_give_the_probabilities_of_transformers(kind: str, tmp_path: Path) -> None:
    """Names, order of rows and metadata are right: without quantized blocks, llama.cpp computes in float32."""
    checkpoint = write_decoder(tmp_path, kind, pack="dense")
    GgufFile(checkpoint, "f32").write(tmp_path / "model.gguf")
    check_equal(by_llama_cpp(tmp_path / "model.gguf"), wanted(checkpoint), kind)


@pytest.mark.parametrize("kind", ["llama", "gemma", "mistral"])
def test_texts_become_the_tokens_of_transformers(kind: str, tmp_path: Path) -> None:
    """Other tokens would give other probabilities."""
    checkpoint = write_decoder(tmp_path, kind, pack="dense")
    GgufFile(checkpoint, "f32").write(tmp_path / "model.gguf")
    tokens = AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"]
    check_equal(by_llama_cpp(tmp_path / "model.gguf", TEXT), wanted(checkpoint, tokens), kind)


def check_equal(found: list[tuple[int, float]], expected: list[tuple[int, float]], kind: str) -> None:
    """llama.cpp's server does not list some tokens that are parts of a character."""
    left, bound = iter(expected), ROUNDING["gelu" if kind.startswith("gemma") else "silu"]
    assert len(found) >= 3
    for number, value in found:
        assert any(number == other and value == pytest.approx(own, abs=bound) for other, own in left)


def test_the_server_answers_with_the_commands_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of 4-bit weights, in front of which llama.cpp rounds activations to 8 bits, so that only the first
    token is compared."""
    checkpoint = write_decoder(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    exported = documented("epmq export")[0]
    main([str(checkpoint) if word == "runs/other/checkpoint" else word for word in exported[2:]])
    [[program, *options]] = documented("llama-server")
    assert program == "llama-server"
    side = Path(__file__).with_name("llama_cpp_serve_side.py")
    question = {"prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    with served([PYTHON, str(side), *options], tmp_path / "log") as address:
        answer = asked(f"{address}/v1/completions", question)
    first = answer["choices"][0]["logprobs"]["content"][0]
    check_greedy(checkpoint, PROMPT, [first["id"]], [first["logprob"]], 0.2)


SMALL = [(4, "none"), (4, "whole"), (5, "none"), (5, "whole"), (8, "none")]
LARGE = [(2, "none"), (2, "whole"), (3, "none"), (6, "none")]


@pytest.mark.parametrize(
    ("bits", "points", "group_size"), [*((*each, 32) for each in SMALL), *((*each, 256) for each in LARGE)]
)
def test_quantized_files_load(bits: int, points: Any, group_size: int, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits in front of such a block, so that only the first token is compared."""
    checkpoint = write_decoder(tmp_path, "qwen2" if group_size == 32 else "wide", bits, points, group_size)
    GgufFile(checkpoint, "f16").write(tmp_path / "model.gguf")
    model: Any = epmq_cli.load(checkpoint, kernel="dequantize")
    values = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    number, value = by_llama_cpp(tmp_path / "model.gguf")[0]
    assert value == pytest.approx(float(values[number]), abs=0.2)
    assert value > float(values.max()) - 0.4
