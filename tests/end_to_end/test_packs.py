"""Oracles: the weights and scores of pack=compressed_tensors, for every option of conf/pack; the bytes of an
uninterrupted run; the bytes of one process."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from gguf import GGUFReader
from transformers import LlamaConfig, LlamaForCausalLM

from epmq_cli.checkpoint.gguf.write import GgufFile
from epmq_cli.checkpoint.load import kernels, load
from epmq_cli.commands.eval import evaluate
from epmq_cli.commands.merge import merge
from epmq_cli.commands.verify import verify
from epmq_cli.errors import ConfigError
from epmq_cli.inspection.plan import plan_content
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.steps import open_models
from epmq_cli.store.atomic import PARTIAL
from tests.faults.driver import at_file, attempt, command, files, mini, torchrun
from tests.helpers.byte_level import SIZE, write_tokenizer
from tests.helpers.hubs import config, eval_config, merge_config, run_in
from tests.helpers.minihub import decoder_files
from tests.helpers.minihub import tokenizer as word_level
from tests.helpers.packs import PACKS, exporter_of
from tests.helpers.tiers import first

ENCODERS = [pack for pack in PACKS if pack != "gguf"]
"""The options that store encoders."""
OPTIONS = ("quant=rtn", "pack.dtype=float16", "calib.samples=8", "eval.samples=8", "eval.stages=[quantized]")
"""The overrides of all runs."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a decoder for each option, named after the option."""
    folder = tmp_path_factory.mktemp("packs")
    hub = decoder_files(folder / "hub", LlamaForCausalLM(LlamaConfig(**SIZE)).eval())
    write_tokenizer(hub / "base")
    for pack in PACKS:
        run_in(folder / pack, hub, f"pack={pack}", "quant.symmetric=false", "group_size=32", *OPTIONS)
    return folder


@pytest.mark.parametrize("pack", PACKS)
def test_every_pack_is_sound_with_the_same_weights_and_scores(pack: str, runs: Path) -> None:
    verify(runs / pack / "checkpoint", True, "cpu", None)
    model, other = (load(runs / name / "checkpoint", "cpu", "dequantize") for name in (pack, "compressed_tensors"))
    wanted = other.state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    scores = [json.loads((runs / name / "metrics.json").read_text())["scores"] for name in (pack, "compressed_tensors")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("pack", PACKS)
def test_every_pack_is_scored_by_eval(pack: str, runs: Path, tmp_path: Path) -> None:
    evaluate(eval_config(runs / pack / "checkpoint", "eval.samples=8"), tmp_path, [])
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["scores"] == json.loads((runs / pack / "metrics.json").read_text())["scores"]
    assert found["kernels"]["int4"] == 0


@pytest.mark.parametrize("pack", PACKS)
def test_model_card_and_record_describe_the_storage_of_weights(pack: str, runs: Path) -> None:
    exporter, checkpoint = exporter_of(pack), runs / pack / "checkpoint"
    card = (checkpoint / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["merge", "quantization", *exporter.tags, "epmq"]
    assert ("4 bits, asymmetric, groups of 32, stored dequantized\n" in card) != exporter.packs
    assert all(package in card for package in exporter.requires)
    record = json.loads((checkpoint / "epmq.json").read_text())
    assert record["config"]["pack"]["_target_"].endswith(f".{type(exporter).__name__}")
    config = json.loads((checkpoint / "config.json").read_text())
    assert ("quantization_config" in config) == exporter.packs


def test_gguf_holds_the_tensors_that_export_writes(runs: Path, tmp_path: Path) -> None:
    """Only the name of the model differs: of the suite, so that every folder gets the same bytes."""
    checkpoint = runs / "gguf" / "checkpoint"
    GgufFile(runs / "compressed_tensors" / "checkpoint", "f16").write(tmp_path / "model.gguf", "mini")
    assert (checkpoint / "model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    card = (checkpoint / "README.md").read_text()
    assert "\nllama-cli -m path/of/this/folder/model.gguf\n" in card
    assert "epmq export" not in card


def test_a_plan_has_the_size_of_the_gguf(runs: Path) -> None:
    cfg = config(runs / "hub", "pack=gguf", "quant.symmetric=false", "group_size=32", *OPTIONS)
    planned = plan_content(cfg)["estimate"]["disk"]["model.gguf"]
    written = (runs / "gguf" / "checkpoint" / "model.gguf").stat().st_size
    assert planned == pytest.approx(written, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [("bits=4.5",), ("budget=155KB",), ("quant=none",)])
def test_a_plan_has_about_the_size_of_the_gguf_of_a_mix(limit: tuple[str, ...], runs: Path, tmp_path: Path) -> None:
    options = ("pack=gguf", "group_size=32", *OPTIONS, *limit)
    planned = plan_content(config(runs / "hub", *options))["estimate"]["disk"]["model.gguf"]
    written = (run_in(tmp_path, runs / "hub", *options) / "model.gguf").stat().st_size
    assert planned == pytest.approx(written, rel=0.03)


def test_a_dense_merge_has_its_gguf_too(runs: Path, tmp_path: Path) -> None:
    """Oracle: the bytes of the checkpoint's tensors in float16."""
    merge(merge_config(runs / "hub", "pack=gguf"), tmp_path, [])
    [stored] = [t for t in GGUFReader(tmp_path / "checkpoint" / "model.gguf").tensors if t.name == "token_embd.weight"]
    wanted = load(tmp_path / "checkpoint", "cpu", "dequantize").get_parameter("model.embed_tokens.weight")
    assert torch.equal(torch.tensor(stored.data), wanted.half())
    verify(tmp_path / "checkpoint", False, "cpu", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("bits=7",), "pack=gguf: GGUF holds integers of 2, 4 and 5 bits, .*, got int7; use bits=4, 5 or 8"),
        (("group_size=16",), "pack=gguf: GGUF needs groups that are multiples of 32 inputs at 4 bits, got 16"),
        (("bits=3",), "pack=gguf: GGUF needs groups that are multiples of 256 inputs at 3 bits, got 32"),
        (("quant.format=fp8", "bits=8"), "pack=gguf: GGUF holds integers of .*, got fp8"),
        (("pack.dtype=bfloat16",), "pack.dtype must be one of float16, got 'bfloat16'"),
        (("pack.dense=q4_0",), "pack.dense must be one of f16, bf16, f32, q8_0, got 'q4_0'"),
        (("pack.engine=gptqmodel",), "pack.engine=gptqmodel: GPTQModel does not read pack=compressed_tensors"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_before_models_are_opened(
    options: tuple[str, ...], message: str, runs: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_job(config(runs / "hub", "pack=gguf", "group_size=32", "suite.base=nowhere", "quant=rtn", *options))


def test_gguf_refuses_other_families_and_tokenizers(bert_hub: Path, runs: Path) -> None:
    with pytest.raises(ConfigError, match="pack=gguf: llama.cpp does not load models of family bert, only of"):
        make_job(config(bert_hub, "pack=gguf", "group_size=32"))
    word_level(runs / "hub" / "base", end=False)
    with pytest.raises(ConfigError, match="pack=gguf: GGUF is written for tokenizers by BPE, got WordLevel"):
        open_models(make_job(config(runs / "hub", "pack=gguf", "group_size=32")))
    write_tokenizer(runs / "hub" / "base")


@pytest.mark.parametrize("pack", PACKS)
def test_packed_weights_use_the_int4_kernel(pack: str, runs: Path) -> None:
    found = kernels(load(runs / pack / "checkpoint", "cpu", "auto"))
    assert (found["int4"] > 0) == exporter_of(pack).packs


def test_the_int4_kernel_is_refused_for_dense_weights_first(runs: Path) -> None:
    job = make_job(config(runs / "hub", "pack=dense", "eval.kernel=int4"))
    with pytest.raises(ConfigError, match="kernel=int4 needs quantized linears, but the model has none; use"):
        open_models(job)


@pytest.mark.parametrize("pack", [pack for pack in ENCODERS if exporter_of(pack).packs])
def test_real_zero_points_are_refused_first(pack: str, bert_hub: Path) -> None:
    options = ("quant=hqq", "quant.zero_point=real", "suite.base=nowhere")
    with pytest.raises(ConfigError, match="those of this quantizer are real numbers; use .*pack=dense"):
        make_job(config(bert_hub, f"pack={pack}", *options))
    assert not make_job(config(bert_hub, "pack=dense", *options)).exporter.packs


@pytest.mark.parametrize("pack", first(1, ENCODERS))
def test_a_run_killed_while_packing_resumes_to_the_same_bytes(pack: str, bert_hub: Path, tmp_path: Path) -> None:
    options, run = (f"pack={pack}", *OPTIONS, "eval.stages=[]"), tmp_path / "run"
    assert attempt(tmp_path / "whole", bert_hub, *options) == 0
    hook = at_file(3, run / PARTIAL.format("checkpoint"))
    assert attempt(run, bert_hub, *options, hook=hook) == -signal.SIGKILL
    assert not (run / "checkpoint").exists()
    assert attempt(run, bert_hub, *options) == 0
    assert files(run) == files(tmp_path / "whole")
    verify(run / "checkpoint", False, "cpu", None)


@pytest.mark.slow
@pytest.mark.parametrize("pack", ENCODERS)
def test_two_processes_write_the_bytes_of_one(pack: str, bert_hub: Path, tmp_path: Path) -> None:
    arguments = (*mini(bert_hub), f"pack={pack}", *OPTIONS, "calib.samples=16", "eval.stages=[]")
    two = torchrun(tmp_path, *arguments, "out=two")
    assert [process.returncode for process in two] == [0, 0], two[0].stderr
    status, said = command(tmp_path, *arguments, "out=one")
    assert status == 0, said
    assert files(tmp_path / "two") == files(tmp_path / "one")
