"""vLLM on a CPU. Oracle: transformers on the same checkpoint. `make engines` runs this.

In float32, where vLLM has no int4 operator, a reference of this one operator takes its place (vllm_side.py): this shows
that vLLM reads every number as we mean it. In bfloat16 its own operator runs, on processors with AVX-512.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoTokenizer

from epmq_cli.checkpoint.engines import ENGINES
from epmq_cli.families import FAMILIES
from epmq_cli.families.family import load_model
from epmq_cli.models import attention
from epmq_cli.models.attention import Recorder
from epmq_cli.models.mixtures import MIXTURES
from epmq_cli.quantize.formats.fp8 import LARGEST
from tests.engines.greedy import COUNT, PROMPT, by_transformers
from tests.helpers.engine_kinds import KINDS, write_kind

PYTHON = os.environ.get("EPMQ_VLLM", "")
"""The Python of an environment with vLLM for CPUs."""
ENGINE = ENGINES["vllm_cpu"]
CLIP = 0.5
"""The range of cached keys and values in a test."""
TEXTS = ["red photo of a film", "a film"]
DECODERS = [name for name, kind in KINDS.items() if kind.families == ("causal_lm",)]
ENCODERS = [(name, family) for name, kind in KINDS.items() for family in kind.families if family in ("bert", "clip")]
LOADS = [name for name in DECODERS if KINDS[name].refusals(ENGINE) == [None]]
ROUNDED = [name for name in LOADS if any(format.activations != "none" for format in KINDS[name].formats)]
"""Kinds whose activations vLLM rounds, which transformers does not."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs vLLM: make engines"),
]


def asked(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """vLLM's answers to jobs."""
    side = Path(__file__).with_name("vllm_side.py")
    done = subprocess.run([PYTHON, str(side)], input=json.dumps(jobs), check=True, stdout=subprocess.PIPE, text=True)
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind."""
    return {
        name: write_kind(tmp_path_factory.mktemp(name), name, "causal_lm", ("llama", "qwen2")[number % 2])
        for number, name in enumerate(DECODERS)
    }


@pytest.fixture(scope="module")
def answers(decoders: dict[str, Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """What vLLM writes, by checkpoint and type of activations."""
    keys = [(name, dtype) for name in DECODERS for dtype in ("float32", "bfloat16") if _asked(name, dtype)]
    jobs = [{"folder": str(decoders[name]), "dtype": dtype, "tokens": PROMPT, "count": COUNT} for name, dtype in keys]
    return dict(zip(keys, asked(jobs), strict=True))


def _asked(name: str, dtype: str) -> bool:
    """vLLM reads pack=gptq in half precision only; one type is enough to show that it loads nothing."""
    if dtype == "bfloat16":
        return name in LOADS or KINDS[name].pack == "gptq"
    return KINDS[name].pack != "gptq"


@pytest.mark.parametrize("name", [name for name in LOADS if KINDS[name].pack != "gptq" and name not in ROUNDED])
def test_vllm_writes_what_transformers_writes(name: str, decoders: Any, answers: Any) -> None:
    answer, wanted = answers[name, "float32"], by_transformers(decoders[name])
    assert "error" not in answer, answer
    assert [token for token, _ in answer["result"]] == [token for token, _ in wanted]
    assert [value for _, value in answer["result"]] == pytest.approx([value for _, value in wanted], abs=1e-4)


@pytest.mark.parametrize("name", LOADS)
def test_vllms_own_operator_agrees_within_bfloat16(name: str, decoders: Any, answers: Any) -> None:
    answer, wanted = answers[name, "bfloat16"], by_transformers(decoders[name])
    assert "error" not in answer, answer
    assert answer["result"][0][0] == wanted[0][0]
    assert answer["result"][0][1] == pytest.approx(wanted[0][1], abs=0.2 if name in ROUNDED else 0.1)


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in LOADS])
def test_vllm_does_not_load_what_we_refuse(name: str, answers: Any) -> None:
    """The limits in ENGINES are those of vLLM."""
    [answer] = [answer for (each, _), answer in answers.items() if each == name]
    assert "error" in answer


def test_vllm_reads_mixtures_of_experts(tmp_path: Path) -> None:
    """Dense ones as they are, packed ones with a reference in place of a kernel that CPUs lack."""
    cases = [("mixtral", "dense"), *((model, "int4-64") for model in MIXTURES if not model.startswith("llama4"))]
    folders = {case: write_kind(tmp_path / "-".join(case), case[1], "causal_lm", case[0]) for case in cases}
    common = {"dtype": "float32", "tokens": PROMPT, "count": COUNT}
    jobs = [{"folder": str(folder), **common} for folder in folders.values()]
    [refused] = asked([jobs[1]])
    assert "No WNA16 MoE backend supports the deployment configuration" in refused["error"]
    for folder, answer in zip(folders.values(), asked([{**job, "mixture": True} for job in jobs]), strict=True):
        assert "error" not in answer, answer
        wanted = by_transformers(folder)
        assert [token for token, _ in answer["result"]] == [token for token, _ in wanted]
        assert [value for _, value in answer["result"]] == pytest.approx([value for _, value in wanted], abs=1e-4)


def test_vllm_reads_packed_and_dense_linears_of_gpt_2(tmp_path: Path) -> None:
    """Its files hold weights of linears as (in, out), packed ones as (out, in)."""
    folders = [write_kind(tmp_path / kind, kind, "causal_lm", "gpt2") for kind in ("int4-64", "int4-zeros", "dense")]
    jobs = [{"folder": str(folder), "dtype": "float32", "tokens": PROMPT, "count": COUNT} for folder in folders]
    for folder, answer in zip(folders, asked(jobs), strict=True):
        assert "error" not in answer, answer
        wanted = by_transformers(folder)
        assert [token for token, _ in answer["result"]] == [token for token, _ in wanted]
        assert [value for _, value in answer["result"]] == pytest.approx([value for _, value in wanted], abs=1e-4)


class Rounded(Recorder):
    """A cache that rounds keys and values to FP8."""

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """The rounded keys and values."""
        scale = CLIP / LARGEST
        codes = [(x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn) for x in (keys, values)]
        return codes[0].float() * scale, codes[1].float() * scale


def test_vllm_caches_keys_and_values_in_fp8_by_the_stored_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: transformers with the same rounding. The range is so small that it cuts most values off, so that other
    scales give other tokens."""
    folder = write_kind(tmp_path, "int4-64", "causal_lm", cached=CLIP)
    [answer] = asked([{"folder": str(folder), "dtype": "float32", "tokens": PROMPT, "count": COUNT}])
    model, tokens = load_model(FAMILIES["causal_lm"], folder, torch.device("cpu")), list(PROMPT)
    monkeypatch.setattr(attention, "Recorder", Rounded)
    with torch.inference_mode(), attention.recorded(model, attention.cached_attentions(model)):
        for token, value in answer["result"]:
            scores = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
            assert int(scores.argmax()) == token
            assert float(scores[token]) == pytest.approx(value, abs=0.15)  # vLLM multiplies rounded keys in bfloat16
            tokens.append(token)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, dict[str, Any]]]:
    """The checkpoint of each kind of encoder, and vLLM's answer. Its inputs are TEXTS, or a picture for CLIP."""
    picture = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.new("RGB", (16, 16), (200, 30, 90)).save(picture)
    folders = {key: write_kind(tmp_path_factory.mktemp("-".join(key)), *key) for key in ENCODERS}
    inputs = {"bert": {"texts": TEXTS}, "clip": {"pictures": [str(picture)]}}
    jobs = [{"folder": str(folders[key]), "dtype": "float32", **inputs[key[1]]} for key in ENCODERS]
    return {
        key: (folders[key], {**answer, **inputs[key[1]]}) for key, answer in zip(ENCODERS, asked(jobs), strict=True)
    }


@pytest.mark.parametrize(("name", "family"), ENCODERS)
def test_vllm_embeds_as_transformers_does(name: str, family: str, encoders: Any) -> None:
    """The directions of the features: vLLM scales embeddings to length 1."""
    folder, answer = encoders[name, family]
    if KINDS[name].refusals(ENGINE)[0] is not None:
        assert "error" in answer
        return
    assert "error" not in answer, answer
    model: Any = load_model(FAMILIES[family], folder, torch.device("cpu"))
    with torch.inference_mode():
        if family == "clip":
            pixels = AutoImageProcessor.from_pretrained(folder)(Image.open(answer["pictures"][0]), return_tensors="pt")
            wanted = model.get_image_features(**pixels).pooler_output
        else:
            tokens = AutoTokenizer.from_pretrained(folder)
            wanted = torch.cat([model(**tokens(text, return_tensors="pt")).last_hidden_state[:, 0] for text in TEXTS])
    found = torch.tensor(answer["result"])
    torch.testing.assert_close(normalize(found, dim=-1), normalize(wanted, dim=-1), atol=1e-5, rtol=0)
