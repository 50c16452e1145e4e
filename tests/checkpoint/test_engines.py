"""Oracles: the table in docs/checkpoint.md, whose cells `make engines` proves; the sources of vLLM 0.32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from epmq_cli.checkpoint.engine import Base
from epmq_cli.checkpoint.engines import ENGINES, check_engine, check_engine_model, engines_for
from epmq_cli.commands.verify import verify
from epmq_cli.config import schema
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.steps import open_models
from epmq_cli.quantize.formats.names import FIXED
from tests.checkpoint.conftest import Made
from tests.helpers.byte_level import write_tokenizer
from tests.helpers.engine_kinds import KINDS, table, write_words
from tests.helpers.formats import ints
from tests.helpers.hubs import config
from tests.helpers.packs import exporter_of
from tests.helpers.pages import ROOT

LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "rope_theta": 10000.0,
}
SHAPES = {
    "layers.0.q_proj": torch.Size((128, 128)),
    "layers.0.k_proj": torch.Size((16, 128)),
    "layers.0.v_proj": torch.Size((16, 128)),
}
"""vLLM multiplies with these three at once, so that only the sum of their outputs counts."""
DECODERS = FAMILIES["causal_lm"]


def test_the_options_are_the_engines() -> None:
    assert (*ENGINES,) == schema.ENGINES


def test_the_documentation_has_the_table() -> None:
    assert table() in (ROOT / "docs" / "checkpoint.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_refuses_what_the_table_says(name: str) -> None:
    """Every cell, in a sentence that names the engine's limit and what to do."""
    for kind in KINDS.values():
        exporter = exporter_of(kind.pack, engine=name)
        for family in kind.families:
            if kind.cell(ENGINES[name]) != "no":
                check_engine(exporter, FAMILIES[family], kind.formats)
                continue
            with pytest.raises(ConfigError, match=f"^pack.engine={name}: (vLLM on|GPTQModel|llama|GGUF).*; use "):
                check_engine(exporter, FAMILIES[family], kind.formats)


@pytest.mark.parametrize(
    ("name", "formats", "sentence"),
    [
        (
            "vllm_cpu",
            [ints(3, 64)],
            "vLLM on CPUs has no kernel for int3, only for int4, w4a8, w8a8 or fp8_dynamic; use int4",
        ),
        (
            "vllm",
            [ints(4, 16)],
            "vLLM on CUDA has kernels for int4 with or without zero points in groups of 32, 64 or 128 or with one "
            "scale per row, got int4 in groups of 16; use one of these, pack=dense or pack.engine=null",
        ),
        (
            "vllm_cpu",
            [ints(4, 64), FIXED["w8a8"]],
            "needs one format in all linears of models of family causal_lm, got int4 and w8a8; use a whole number",
        ),
        ("gptqmodel", [ints(4, 64)], "GPTQModel does not read pack=compressed_tensors; use pack=gptq"),
        ("llama_cpp", [ints(3, 64)], "multiples of 256 inputs at 3 bits, got 64 in every linear; use group_size=256"),
        ("llama_cpp", [ints(4, 16)], "multiples of 32 inputs at 4 bits, got 16 in every linear; use group_size=32"),
    ],
)
def test_refusals_say_what_was_given_and_what_to_do(name: str, formats: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_engine(exporter_of("compressed_tensors", engine=name), DECODERS, formats)


@pytest.mark.parametrize(
    ("shapes", "change", "sentence"),
    [
        ({"layers.0.k_proj": (8, 128)}, {}, r"got layers.0.q_proj \+ k_proj \+ v_proj with 128 inputs and 152 outputs"),
        ({"layers.0.o_proj": (128, 80)}, {}, "multiples of 32, got layers.0.o_proj with 80 inputs and 128 outputs"),
        ({}, {"num_attention_heads": 8}, "takes attention heads of 32, .* or 512 channels, got 16; use pack.engine"),
    ],
)
def test_shapes_that_vllm_does_not_take_are_refused(shapes: Any, change: Any, sentence: str) -> None:
    exporter, formats = exporter_of("compressed_tensors", engine="vllm_cpu"), [ints(4, 16)]
    check_engine_model(exporter, DECODERS, SHAPES, formats, Base(LLAMA, None))
    other = SHAPES | {name: torch.Size(shape) for name, shape in shapes.items()}
    with pytest.raises(ConfigError, match=f"^pack.engine=vllm_cpu: vLLM on CPUs .*{sentence}"):
        check_engine_model(exporter, DECODERS, other, formats, Base({**LLAMA, **change}, None))


CLIP = {
    "model_type": "clip",
    "projection_dim": 64,
    "text_config": {"hidden_size": 64, "num_attention_heads": 2},
    "vision_config": {"hidden_size": 96, "num_attention_heads": 3},
}


@pytest.mark.parametrize("name", ["vllm", "vllm_cpu"])
def test_clip_models_that_vllm_does_not_take_are_refused(name: str, tmp_path: Path) -> None:
    """Oracle: vllm/model_executor/models/clip.py."""
    exporter, clip = exporter_of("compressed_tensors", engine=name), FAMILIES["clip"]
    write_words(tmp_path / "good")
    write_tokenizer(tmp_path / "bad")  # <|end|> is token 0
    for base in (Base(CLIP, tmp_path / "good"), Base(CLIP, None), Base({"model_type": "clip"}, tmp_path / "good")):
        check_engine_model(exporter, clip, {}, [], base)
    with pytest.raises(
        ConfigError, match=f"^pack.engine={name}: .* wider than the projection, got 64 and 32 channels; use"
    ):
        check_engine_model(exporter, clip, {}, [], Base({**CLIP, "projection_dim": 32}, None))
    with pytest.raises(ConfigError, match=f"^pack.engine={name}: .* whose token 0 is not special, .*; use pack.engine"):
        check_engine_model(exporter, clip, {}, [], Base(CLIP, tmp_path / "bad"))


def test_blocks_of_rows_must_fit_the_parts_of_a_fused_matrix() -> None:
    exporter, formats = exporter_of("compressed_tensors", engine="vllm"), [FIXED["fp8_block"]]
    whole = {name: torch.Size((128, 128)) for name in SHAPES}
    check_engine_model(
        exporter, DECODERS, {**whole, "layers.0.v_proj": torch.Size((64, 128))}, formats, Base(LLAMA, None)
    )
    with pytest.raises(
        ConfigError, match=r"q_proj \+ k_proj \+ v_proj .*multiples of 128 outputs .*, got 128, 16, 16; use"
    ):
        check_engine_model(exporter, DECODERS, SHAPES, formats, Base(LLAMA, None))


def test_models_and_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path: Path) -> None:
    exporter, linears, formats = exporter_of("compressed_tensors", engine="llama_cpp"), {**SHAPES}, [ints(4, 32)]
    write_tokenizer(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    check_engine_model(exporter, DECODERS, linears, formats, Base(LLAMA, tmp_path / "good"))
    check_engine_model(exporter, DECODERS, linears, formats, Base(LLAMA, None))
    with pytest.raises(ConfigError, match="^pack.engine=llama_cpp: .*BPE, got Unigram"):
        check_engine_model(exporter, DECODERS, linears, formats, Base(LLAMA, tmp_path / "bad"))
    with pytest.raises(ConfigError, match="^pack.engine=llama_cpp: .* got the model type gpt2"):
        check_engine_model(exporter, DECODERS, linears, formats, Base({**LLAMA, "model_type": "gpt2"}, None))


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "gpt2"])
def test_models_that_transformers_takes_dense_only_are_refused(kind: str) -> None:
    exporter, formats = exporter_of("compressed_tensors", engine="transformers"), [ints(4, 64)]
    family = next(family for family in FAMILIES.values() if kind in family.model_types)
    check_engine_model(exporter, family, {}, [], Base({"model_type": kind}, None))
    with pytest.raises(ConfigError, match=f"models of type {kind} with dense weights only.*; use pack=dense"):
        check_engine_model(exporter, family, {}, formats, Base({"model_type": kind}, None))


def test_dense_checkpoints_of_any_format_are_taken() -> None:
    """`pack=dense` stores no packed weights, so that no kernel is needed."""
    for name, engine in ENGINES.items():
        if "dense" in engine.kernels:
            check_engine(exporter_of("dense", engine=name), DECODERS, [ints(3, 16)])


def test_a_run_is_refused_before_models_are_opened(clip_hub: Path) -> None:
    with pytest.raises(ConfigError, match="pack.engine=vllm_cpu: vLLM on CPUs has no kernel for int3"):
        make_job(config(clip_hub, "pack.engine=vllm_cpu", "bits=3"))


def test_a_run_is_refused_before_calibration_for_its_shapes(bert_hub: Path) -> None:
    job = make_job(config(bert_hub, "pack.engine=vllm_cpu", "group_size=32"))
    with pytest.raises(ConfigError, match="pack.engine=vllm_cpu: vLLM on CPUs takes attention heads of 32, .*, got 16"):
        open_models(job)


def test_the_card_lists_the_engines_that_load_the_checkpoint(made: Made) -> None:
    checkpoint, _ = made("bert")
    verify(checkpoint, False, "cpu", None)
    card = (checkpoint / "README.md").read_text()
    assert "Loaded by transformers, vLLM on CUDA (by its sources). With transformers:\n" in card
    assert "vllm serve path/of/this/folder --runner pooling\n" in card
    assert "llama" not in card


def test_the_card_of_a_decoder_has_the_commands(tmp_path: Path) -> None:
    from epmq_cli.checkpoint.loading_code import shell_commands

    write_tokenizer(tmp_path)
    exporter, formats = exporter_of("compressed_tensors"), [ints(4, 32)]
    engines = engines_for(exporter, DECODERS, SHAPES, formats, Base(LLAMA, tmp_path))
    assert [engine.title for engine in engines] == ["transformers", "vLLM on CUDA", "vLLM on CPUs", "llama.cpp"]
    assert shell_commands(engines, DECODERS, exporter) == {
        "vLLM on CUDA (by its sources) and vLLM on CPUs": "vllm serve path/of/this/folder",
        "llama.cpp": "epmq export path/of/this/folder model.gguf\nllama-cli -m model.gguf",
    }
