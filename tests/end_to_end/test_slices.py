"""Oracles: `epmq merge` of the same slices, and a run that quantizes its result as a model without experts."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import jsonschema
import pytest
import torch
import transformers as t
from torch import Tensor

from epmq_cli.commands.eval import evaluate
from epmq_cli.commands.verify import verify
from epmq_cli.errors import ConfigError
from epmq_cli.families import claiming
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.pipeline.job import make_job
from epmq_cli.report.metrics_json import schema
from tests.commands.test_merge import merged
from tests.conftest import TASKS
from tests.faults.driver import PACK, at_stage, attempt, files
from tests.helpers.hubs import config, eval_config, run_in
from tests.helpers.minihub import build, decoder_hub
from tests.helpers.tiers import first, only

AVERAGE = "{_target_: epmq_cli.merge.average.Average}"
LONGER = f"merge.slices=[{{expert: {TASKS[0]}, layers: null}}, {{expert: {TASKS[1]}, layers: [1, 2]}}]"
SHORTER = f"merge.slices=[{{experts: {{{TASKS[0]}: [1, 2], {TASKS[1]}: [0, 1]}}, merge: {AVERAGE}}}]"
T5 = f"merge.slices={{decoder: [{{expert: {TASKS[1]}, layers: [1, 2]}}], encoder: {LONGER.partition('=')[2]}}}"
"""The cache of transformers has no place for more layers in the decoder than in the encoder."""
SLICES = {"longer": ("merge=passthrough", LONGER), "shorter": ("merge=slices", SHORTER)}
QUICK = ("guidance=merged", "eval.samples=4", "pack.dtype=float32")
MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_hub(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize(("kind", "slices"), first(2, [("llama", "longer"), ("clip", "shorter"), ("llama", "shorter")]))
def test_a_run_is_that_of_the_merged_model_alone(
    kind: str, slices: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Byte for byte, GPTQ included."""
    hub, options = request.getfixturevalue({"llama": "llama", "clip": "clip_hub"}[kind]), SLICES[slices]
    folder = merged(hub, tmp_path / "merged", *options, "pack.dtype=float32")
    own = [f"suite.base={folder}", *(f"suite.tasks.{task}.expert={folder}" for task in TASKS)]
    found = run_in(tmp_path / "x", hub, *options, *QUICK)
    wanted = run_in(tmp_path / "y", hub, "merge=none", *own, *QUICK)
    assert (found / MODEL).read_bytes() == (wanted / MODEL).read_bytes()
    assert json.loads((found / "config.json").read_text()) == json.loads((wanted / "config.json").read_text())
    metrics = [json.loads((path.parent / "metrics.json").read_text()) for path in (found, wanted)]
    jsonschema.validate(metrics[0], schema())
    for one, other in zip(*(each["scores"]["tasks"].values() for each in metrics), strict=True):
        assert one.keys() == {"base", "experts", "merged", "quantized"}
        assert (one["merged"], one["quantized"]) == (other["merged"], other["quantized"])
        assert one["base"] != other["base"] or kind != "llama"  # the base keeps its own layers


def own_names(path: Path) -> dict[str, Tensor]:
    """The tensors of a folder under their names in the model."""
    folder = ModelFolder(path, "model")
    return {name: folder.tensor(stored) for name, stored in claiming(folder.config).all_names(folder).items()}


@pytest.mark.parametrize("kind", only(("bert", "t5"), ("bert", "t5", "vit", "deberta", "modernbert", "gemma3")))
def test_an_unquantized_run_writes_the_merge(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Of models with two stacks, heads, lists over the layers or tied tables."""
    hub = request.getfixturevalue("bert_hub") if kind == "bert" else build(tmp_path / "hub", kind)
    options = ("merge=passthrough", T5 if kind == "t5" else LONGER)
    folder = merged(hub, tmp_path / "merged", *options, "pack.dtype=float32")
    checkpoint = run_in(tmp_path / "run", hub, *options, *QUICK, "quant=none")
    found, wanted = own_names(checkpoint), own_names(folder)
    assert len(found) > 10
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    verify(checkpoint, True, "cpu", None)


def test_transformers_verify_and_eval_take_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path / "run", llama, *SLICES["longer"], *QUICK, "bits=8")
    verify(checkpoint, True, "cpu", None)
    (tmp_path / "again").mkdir()
    evaluate(eval_config(checkpoint, "eval.samples=4"), tmp_path / "again", [])
    run, again = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "again"))
    for task, scores in again["scores"]["tasks"].items():
        assert scores["quantized"] == pytest.approx(run["scores"]["tasks"][task]["quantized"], rel=1e-3)
    loaded = t.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    dense = merged(llama, tmp_path / "merged", *SLICES["longer"], "pack.dtype=float32")
    exact = t.AutoModelForCausalLM.from_pretrained(dense).eval()
    assert loaded.config.num_hidden_layers == exact.config.num_hidden_layers == 3
    ids = torch.tensor([[1, 7, 9, 11, 8, 3]])
    torch.testing.assert_close(loaded(ids).logits, exact(ids).logits, rtol=0, atol=0.02)


def test_a_killed_run_continues_with_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    """Killed before it packs; without the cache of the run that continued."""
    options = (*SLICES["longer"], *QUICK, "cache=10MB")
    assert attempt(tmp_path / "run", llama, *options, hook=at_stage(PACK)) == -signal.SIGKILL
    assert attempt(tmp_path / "run", llama, *options) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["resumed"] == 1
    assert attempt(tmp_path / "whole", llama, *SLICES["longer"], *QUICK) == 0
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_cached_merges_and_disks_give_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    options = (*SLICES["shorter"], *QUICK, "eval.stages=[merged]", "quant=rtn")
    cached = [run_in(tmp_path / name, llama, *options, "cache=10MB") for name in ("a", "b")]
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["cache"]["made"] == 0
    disk = run_in(tmp_path / "disk", llama, *options, "calib.student=disk")
    assert len({(path / MODEL).read_bytes() for path in (*cached, disk)}) == 1


def test_asymmetric_guidance_needs_only_the_merged_model(llama: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path / "run", llama, *SLICES["longer"], *QUICK, "guidance=asymmetric")
    verify(checkpoint, False, "cpu", None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("guidance=expert",), "guidance.targets=expert"),
        (("guidance=feature",), "guidance.(targets=expert|rho=2)"),
        (("guidance=merged", "guidance.rho=0.5"), "guidance.rho=0.5"),
        (("guidance=merged", "guidance.lam=auto"), "guidance.lam=auto"),
    ],
)
def test_guidance_by_the_layers_of_other_models_is_refused(options: tuple[str, ...], named: str, llama: Path) -> None:
    for name, slices in SLICES.values():
        message = rf"{name} with merge.slices changes the layers .*, but {named} needs .*; use guidance=merged, or epmq"
        with pytest.raises(ConfigError, match=message):
            make_job(config(llama, name, slices, *options))


def test_layers_that_the_models_lack_are_refused_first(llama: Path, tmp_path: Path) -> None:
    slices = f"merge.slices=[{{expert: {TASKS[0]}, layers: [0, 9]}}]"
    with pytest.raises(ConfigError, match="takes layers 0 to 8 of model.layers, and the models have 2"):
        run_in(tmp_path / "run", llama, "merge=passthrough", slices, *QUICK)
    assert not any((tmp_path / "run").iterdir())
    hub = build(tmp_path / "modernbert", "modernbert")  # its first layer has one norm less
    with pytest.raises(ConfigError, match="must begin with layer 0 of layers and use it nowhere else, because it has"):
        run_in(tmp_path / "run", hub, *SLICES["shorter"], *QUICK)


def test_slices_take_methods_without_data_and_slices(llama: Path) -> None:
    nested = f"passthrough.Passthrough, slices: [{{expert: {TASKS[0]}, layers: null}}]"
    for method, message in (
        ("regmean.RegMean, alpha: 0.9", "merge.slices cannot use regmean, which needs calibration data"),
        (nested, r"merge.slices\[0\].merge must have no slices of its own"),
    ):
        inner = f"{{_target_: epmq_cli.merge.{method}}}"
        slices = f"merge.slices=[{{experts: {{{TASKS[0]}: null}}, merge: {inner}}}]"
        with pytest.raises(ConfigError, match=message):
            make_job(config(llama, "merge=slices", slices, *QUICK))
