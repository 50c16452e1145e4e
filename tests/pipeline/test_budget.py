"""Oracles: the sizes of written files, the names that engines fuse, and the sentences of refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import validate

from epmq_cli.checkpoint.engines import FUSED, check_engine
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.families.family import linear_groups
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.budget import loadable, sizes_of
from epmq_cli.pipeline.job import make_job
from epmq_cli.quantize.mixed_precision import MixedPrecision, Sizes, formats_of
from epmq_cli.quantize.rtn import Rtn
from epmq_cli.report.metrics_json import schema
from tests.helpers.formats import ints
from tests.helpers.hubs import config, run_in
from tests.helpers.minihub import hub_of
from tests.helpers.packs import exporter_of
from tests.helpers.tiers import first

HUBS = ["bert", "llama", "clip", "qwen3", "vit", "roberta"]
MIXES = MixedPrecision(tuple(Rtn(ints(bits, 32), "mse") for bits in (2, 3, 4, 8)), budget=1)


def sizes(hub: Path, *overrides: str, budget: str = "1GB") -> tuple[Sizes, dict[str, str]]:
    """The sizes of a model's checkpoint, and the groups of its linears."""
    job = make_job(config(hub, f"budget={budget}", *overrides))
    _, model, dtype = steps.open_models(job)
    assert isinstance(job.quantizer, MixedPrecision)
    return sizes_of(job.quantizer, job, model, dtype), linear_groups(model, job.family)


@pytest.mark.parametrize("kind", first(1, HUBS))
def test_the_checkpoint_fits_the_budget_and_fills_it(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    hub = hub_of(kind, request, tmp_path / "hub")
    known, groups = sizes(hub)
    budget = (known.smallest + known.largest) // 2
    given = f"{budget / 1000:.3f}KB"
    known, _ = sizes(hub, budget=given)
    folder = run_in(tmp_path / "run", hub, f"budget={given}", "eval.stages=[]")
    written = (folder / "model.safetensors").stat().st_size
    assert 0.9 * budget <= written <= budget
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    validate(metrics, schema())
    assert metrics["bytes"]["model_packed"] == written
    table = {name: entry for entry in metrics["sensitivity"] for name in entry["linears"]}
    assert {layer["name"]: f"int{layer['bits']}" for layer in metrics["layers"] if layer["bits"]} == {
        name: entry["chosen"] for name, entry in table.items()
    }
    assert len({entry["chosen"] for entry in table.values()}) > 1
    chosen = [next(one for one in e["candidates"] if one["format"] == e["chosen"]) for e in metrics["sensitivity"]]
    stated = known.rest + sum(one["bytes"] for one in chosen)
    assert written <= stated <= budget
    assert stated <= 1.02 * written + 2000
    for name in groups:
        parent, _, last = name.rpartition(".")
        fused = next((parts for parts in FUSED if last in parts), (last,))
        assert len({groups.get(f"{parent}.{part}", groups[name]) for part in fused}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("quant.format=[int4,fp8]",), ("pack.shard_size=20KB",), ("group_size=[8,16,32]",)]
)
def test_sizes_hold_for_other_formats_and_for_shards(options: tuple[str, ...], bert_hub: Path, tmp_path: Path) -> None:
    known, _ = sizes(bert_hub, *options)
    budget = (known.smallest + known.largest) // 2
    run_in(tmp_path, bert_hub, *options, f"budget={budget / 1000:.3f}KB", "eval.stages=[]")
    written = json.loads((tmp_path / "metrics.json").read_text())["bytes"]["model_packed"]
    assert 0.9 * budget <= written <= budget


def test_a_budget_below_the_smallest_checkpoint_is_refused_with_the_sizes(bert_hub: Path) -> None:
    known, _ = sizes(bert_hub, budget="99KB")
    small = f"budget={known.smallest // 1000 - 1}KB"
    with pytest.raises(ConfigError) as error:
        steps.open_models(make_job(config(bert_hub, small)))
    found = re.fullmatch(
        rf"{small} is too small: the weight files of this model take (\d+)KB \(all linears int2\) to (\d+)KB \(all "
        r"int8\); give a larger budget or group_size",
        str(error.value),
    )
    assert found is not None
    assert 0 <= int(found[1]) * 1000 - known.smallest < 1000
    steps.open_models(make_job(config(bert_hub, f"budget={found[1]}KB")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("bits=2.5",), "bits=2.5 and budget both limit the size; leave out one of them"),
        (("quant.symmetric=false",), "budget mixes formats, which needs quant.symmetric=true"),
        (("quant=hqq",), "budget needs a quantizer of several formats, got quant=hqq; use quant=gptq, rtn, awq"),
        (("quant=none",), "budget needs a quantizer of several formats, got quant=none"),
        (("pack=dense",), "budget limits the size of packed weights, got pack=dense, which stores them dense"),
        (("quant.format=fp8",), "budget chooses among formats, so quant.format must be int, or a list"),
        (("quant.format=[int4,int4]",), "quant.format must be int, or a list of different formats"),
        (("quant.format=[int4,mxfp4]",), "quant.format must be one of int2, int3"),
        (("group_size=[16,0]",), "group_size must be a whole number of input columns above 0, or -1"),
        (("group_size=[16,x]",), "group_size must be a whole number or a list of whole numbers, got [16, 'x']"),
    ],
)
def test_options_that_do_not_go_with_a_budget_are_refused(
    options: tuple[str, ...], message: str, bert_hub: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_job(config(bert_hub, "budget=1MB", *options))


@pytest.mark.parametrize(
    ("engine", "bits"), [(None, [2, 3, 4, 8]), ("vllm", [4, 8]), ("vllm_cpu", [4]), ("llama_cpp", [4, 8])]
)
def test_only_formats_that_the_engine_loads_are_candidates(engine: str | None, bits: list[int]) -> None:
    found = loadable(MIXES, exporter_of("compressed_tensors", engine=engine), FAMILIES["causal_lm"])
    assert [format.bits for format in formats_of(found)] == bits


def test_the_candidates_of_gguf_are_those_of_llama_cpp() -> None:
    found = loadable(MIXES, exporter_of("gguf"), FAMILIES["causal_lm"])
    assert [format.bits for format in formats_of(found)] == [4, 8]


def test_gguf_mixes_blocks_of_k_quants_with_others() -> None:
    several = tuple(Rtn(ints(bits, size), "mse") for bits in (2, 3, 4, 8) for size in (256, 32))
    found = formats_of(loadable(MixedPrecision(several, budget=1), exporter_of("gguf"), FAMILIES["causal_lm"]))
    assert found == tuple(ints(*kind) for kind in ((2, 256), (3, 256), (4, 256), (4, 32), (8, 256), (8, 32)))


def test_an_engine_of_one_format_names_the_group_sizes() -> None:
    formats = [ints(4, 64), ints(4, 32)]
    with pytest.raises(
        ConfigError, match="vLLM on CPUs needs one .* got int4 in groups of 64 and int4 in groups of 32;"
    ):
        check_engine(exporter_of("compressed_tensors", engine="vllm_cpu"), FAMILIES["causal_lm"], formats)
    with pytest.raises(ConfigError, match="stores one format for all linears, got int4 in groups of 64 and int4 in gr"):
        exporter_of("gptq").check(FAMILIES["causal_lm"], formats)


def test_vllm_loads_mixes_of_decoders_and_not_of_bert() -> None:
    exporter, formats = exporter_of("compressed_tensors", engine="vllm"), [ints(4, 32), ints(8, 32)]
    check_engine(exporter, FAMILIES["causal_lm"], formats)
    with pytest.raises(ConfigError, match="vLLM on CUDA needs one format in all linears of models of family bert, got"):
        check_engine(exporter, FAMILIES["bert"], formats)


def test_an_engine_that_loads_none_of_the_formats_leaves_them_for_its_refusal() -> None:
    exporter = exporter_of("compressed_tensors", engine="vllm")
    assert formats_of(loadable(MIXES, exporter, FAMILIES["t5"])) == formats_of(MIXES)
