"""Checkpoints of mixtures of experts. Oracles: our own reading, and the sentences of the engines' refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import epmq_cli
from epmq_cli.checkpoint.engine import Base
from epmq_cli.checkpoint.engines import ENGINES, check_engine_model
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.families.family import linear_shapes
from epmq_cli.models.routed_experts import unpacked
from epmq_cli.quantize.formats.names import FIXED
from tests.helpers.architectures import TAKEN, built
from tests.helpers.engine_kinds import KINDS, write_kind
from tests.helpers.formats import ints
from tests.helpers.packs import exporter_of
from tests.helpers.tiers import only

MIXTRAL = Base({"model_type": "mixtral"}, None)
CAUSAL_LM = FAMILIES["causal_lm"]
PACKED = [
    name
    for name, kind in KINDS.items()
    if kind.families == ("causal_lm",) and kind.pack == "compressed_tensors" and name != "k-quants"
]


GLOBAL: dict[str, Any] = {"global_scale": 64.0}
"""Of a tensor whose groups have small scales."""


@pytest.mark.parametrize("name", only(("int4-32",), PACKED))
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_experts_in_the_formats_that_we_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it fails, or has other outputs."""
    formats = [replace(format, **GLOBAL) if name.startswith("nvfp4") else format for format in KINDS[name].formats]
    monkeypatch.setitem(KINDS, name, replace(KINDS[name], formats=tuple(formats)))
    folder = write_kind(tmp_path, name, "causal_lm", "mixtral")
    tokens = torch.tensor([[5, 17, 100, 42, 9, 77]])
    wanted = epmq_cli.load(folder, "cpu", "dequantize")(tokens).logits
    refusal = ENGINES["transformers"].model_refusal(CAUSAL_LM, {}, KINDS[name].formats, MIXTRAL)
    try:
        with torch.inference_mode():
            found = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    except (RuntimeError, ValueError, KeyError):
        assert refusal is not None
    else:
        assert torch.allclose(found, wanted, atol=1e-5, rtol=0) == (refusal is None)


@pytest.mark.parametrize(
    ("name", "format", "sentence"),
    [
        (
            "transformers",
            FIXED["nvfp4a16"],
            "takes mixtures of experts with one format without zero points, int2",
        ),
        ("transformers", ints(4, 64, False), "got int4 with zero points in groups of 64"),
        ("vllm_cpu", ints(4, 64), "vLLM on CPUs takes mixtures of experts with dense weights only, got int4 in groups"),
        ("vllm", FIXED["fp8_dynamic"], "int4 in groups of 32, .* or int8 in groups .*, got fp8_dynamic with one scale"),
    ],
)
def test_engines_refuse_packed_experts_that_they_do_not_load(name: str, format: Any, sentence: str) -> None:
    exporter = exporter_of("compressed_tensors", engine=name)
    with pytest.raises(ConfigError, match=f"^pack.engine={name}: .*{sentence}.*; use "):
        check_engine_model(exporter, CAUSAL_LM, {}, [format], MIXTRAL)
    check_engine_model(exporter_of("dense", engine=name), CAUSAL_LM, {}, [format], MIXTRAL)
    check_engine_model(exporter_of("compressed_tensors", engine="vllm"), CAUSAL_LM, {}, [ints(4, 64)], MIXTRAL)


def test_routers_stay_dense_for_engines_that_pack_every_linear(tmp_path: Path) -> None:
    """vLLM asks for the names of its own linears, and routers are linears there."""
    folder = write_kind(tmp_path, "int4-32", "causal_lm", "qwen2_moe")
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    layers = [f"model.layers.{index}.mlp" for index in range(2)]
    assert {*ignored} == {
        "lm_head",
        *(f"{layer}.{name}" for layer in layers for name in ("gate", "shared_expert_gate")),
    }


def test_pack_gptq_is_refused() -> None:
    model = unpacked(built(TAKEN["mixtral"]))
    with pytest.raises(ConfigError, match="stores no mixtures of experts, got a MixtralForCausalLM; use pack="):
        exporter_of("gptq", dtype="float16").check_linears(dict(linear_shapes(model, CAUSAL_LM)), model, [ints(4, 64)])
