"""Oracles: the run without refinement, transformers' own loss for language models, and runs of other sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from epmq_cli.errors import ConfigError, DataError
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.refinement import Refiner, distance
from epmq_cli.refine import trial
from epmq_cli.refine.distill import Distill
from epmq_cli.refine.training import matrices
from tests.helpers.hubs import config, run_in
from tests.helpers.minihub import hub_of
from tests.helpers.tiers import first

PLAIN = ("guidance=feature", "eval.samples=8")
OPTIONS = (
    *PLAIN,
    "refine=distill",
    "refine.epochs=4",
    "refine.batch_size=4",
    "refine.lr=[0.001,0.00003]",
    "refine.views=2",
)
KINDS = ("llama", "bert", "clip", "t5", "vit", "roberta", "modernbert", "deberta")


@pytest.fixture(autouse=True)
def every_gain_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The miniatures hold out too few samples to tell a gain from chance."""
    monkeypatch.setattr(trial, "CERTAIN", 0)


def entry(folder: Path) -> dict[str, Any]:
    """The entry of metrics.json about the training of the dense model."""
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())["refine"]["dense"]
    return found


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("kind", first(1, KINDS))
def test_the_held_out_samples_decide_in_every_family(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    hub = hub_of(kind, request, tmp_path / "hub")
    run_in(tmp_path / "refined", hub, *OPTIONS)
    run_in(tmp_path / "plain", hub, *PLAIN)
    found = entry(tmp_path / "refined")
    refined, plain = (weights(tmp_path / name / "checkpoint") for name in ("refined", "plain"))
    assert refined.keys() == plain.keys()
    best = min(found["trials"], key=lambda each: each["losses"][each["best"]])
    assert best["agreements"][best["best"]] >= best["agreements"][0]
    assert found["refined"] == (best["losses"][best["best"]] < best["losses"][0])
    assert found["refined"] == any(not torch.equal(refined[name], plain[name]) for name in plain)
    assert found["refined"] or kind == "t5"  # whose miniature starts near an optimum
    assert "refine" not in json.loads((tmp_path / "plain" / "metrics.json").read_text())


def test_near_experts_lower_the_learning_rate(bert_hub: Path, tmp_path: Path) -> None:
    job = make_job(config(bert_hub, *OPTIONS, "merge=average", "refine.lr=auto"))
    models, model, dtype = steps.open_models(job)
    experts = [dict(models.source.model(task)) for task in models.source.tasks]
    names = [name for name in experts[0] if name.endswith(("query.weight", "output.dense.weight"))]
    stacks = [torch.stack([expert[name] for expert in experts]) for name in names]
    expected = [float((stack - stack.mean(0)).square().mean().sqrt()) for stack in stacks]
    found = [distance(LazyMerge(models.source, job.merge, torch.float32), [name]) for name in names]
    assert found == pytest.approx(expected, rel=1e-4)
    auto = job.refine
    assert isinstance(auto, Distill)
    assert auto.rates(0.002) == [pytest.approx(0.00024)]
    assert auto.rates(1.0) == [0.0003]
    assert replace(auto, lr=[0.1, 0.2]).rates(1.0) == [0.1, 0.2]
    run_in(tmp_path / "run", bert_hub, *OPTIONS, "merge=average", "refine.lr=auto", "refine.epochs=1")
    [trial] = entry(tmp_path / "run")["trials"]
    linears = matrices(job.family, model)
    assert trial["lr"] == auto.rates(distance(LazyMerge(models.source, job.merge, dtype), linears))[0]


def test_training_that_does_not_help_leaves_the_run_as_it_is(bert_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path / "refined", bert_hub, *OPTIONS, "refine.lr=[1,0.9]", "refine.epochs=1")
    run_in(tmp_path / "plain", bert_hub, *PLAIN)
    found = entry(tmp_path / "refined")
    assert not found["refined"]
    assert [each["lr"] for each in found["trials"]] == [1, 0.9]
    refined, plain = (weights(tmp_path / name / "checkpoint") for name in ("refined", "plain"))
    for name, tensor in plain.items():
        assert torch.equal(refined[name], tensor)


PACKED = (*PLAIN, "refine=distill", "refine.epochs=0", "refine.packed_epochs=4", "refine.batch_size=4")
QUANTIZERS = (
    "bits=2",
    "quant=rtn quant.symmetric=false",
    "quant=awq",
    "bits=8 quant.format=fp8",
    "bits=2.5",
    "quant=hqq",
)


def both(
    hub: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, options: Sequence[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a run that trains the packed model, in `folder`/packed, and of one that skips the training."""
    run_in(folder / "packed", hub, *options)
    monkeypatch.setattr(Refiner, "packed", lambda *_: None)
    run_in(folder / "plain", hub, *options)
    return weights(folder / "packed" / "checkpoint"), weights(folder / "plain" / "checkpoint")


@pytest.mark.parametrize("options", first(1, QUANTIZERS))
def test_training_of_the_packed_model_keeps_its_codes(
    options: str, bert_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (*PACKED, "refine.packed=scales", "refine.packed_lr=0.001", "guidance=merged", *options.split())
    packed, plain = both(bert_hub, tmp_path, monkeypatch, own)
    changed = {name for name, tensor in plain.items() if not torch.equal(packed[name], tensor)}
    found = json.loads((tmp_path / "packed" / "metrics.json").read_text())["refine"]
    assert found["packed"]["refined"]
    assert "dense" not in found
    assert any(name.endswith("weight_scale") for name in changed)
    assert any(name.endswith(("bias", "LayerNorm.weight")) for name in changed)
    assert not [name for name in changed if name.endswith(("packed", "zero_point", "embeddings.weight"))]
    [only] = found["packed"]["trials"]
    assert only["losses"][only["best"]] == min(only["losses"])


@pytest.mark.parametrize("options", first(1, ("bits=2", "quant=hqq pack=dense")))
def test_codes_of_the_packed_model_can_be_trained(
    options: str, bert_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (*PACKED, "refine.packed_lr=0.03", "guidance=merged", *options.split())
    packed, plain = both(bert_hub, tmp_path, monkeypatch, own)
    changed = {name for name, tensor in plain.items() if not torch.equal(packed[name], tensor)}
    assert json.loads((tmp_path / "packed" / "metrics.json").read_text())["refine"]["packed"]["refined"]
    assert not any(name.endswith("scale") for name in changed)
    assert any(name.endswith(("packed", "query.weight")) for name in changed)


def test_only_codes_that_are_integers_are_trained(bert_hub: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"quant.format=nvfp4a16 has coarse or shared scales; use refine.packed_epochs=0, or"
    ):
        make_job(config(bert_hub, *PACKED, "bits=4", "group_size=16", "quant.format=nvfp4a16"))
    with pytest.raises(ConfigError, match=r"trains integers, got quant.format=fp8; use quant.format=int, or refine.p"):
        make_job(config(bert_hub, *PACKED, "bits=8", "quant.format=fp8"))


def test_a_packed_model_that_training_does_not_help_stays_as_it_is(
    bert_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, plain = both(bert_hub, tmp_path, monkeypatch, (*PACKED, "refine.packed_lr=1"))
    assert not json.loads((tmp_path / "packed" / "metrics.json").read_text())["refine"]["packed"]["refined"]
    for name, tensor in plain.items():
        assert torch.equal(packed[name], tensor)


def test_all_refinements_in_one_run(bert_hub: Path, tmp_path: Path) -> None:
    own = ("epochs=2", "packed_epochs=2", "batch_size=4", "views=2")
    few = ("iterations=4", "every=2", "batch_size=4")
    options = [*(f"refine.distill.{text}" for text in own), *(f"refine.blocks.{text}" for text in few)]
    run_in(tmp_path / "run", bert_hub, *PLAIN, "bits=2", "refine=both", *options)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["refine"].keys() == {"dense", "packed"}
    assert len(found["blocks"]) > 0
    with pytest.raises(ConfigError, match=r"refine.distill.lr must be a number in \(0, 1\], got 2"):
        make_job(config(bert_hub, "refine=both", "refine.distill.lr=2"))


def test_updates_of_low_rank(bert_hub: Path, tmp_path: Path) -> None:
    lora = ("refine.trained=lora", "refine.rank=2", "refine.lr=0.01", "quant=none")
    run_in(tmp_path / "run", bert_hub, *OPTIONS, *lora)
    assert entry(tmp_path / "run")["refined"]


@pytest.mark.slow
def test_norms_alone(bert_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path / "run", bert_hub, *OPTIONS, "refine.trained=norms", "quant=none", "refine.lr=0.01")
    job = make_job(config(bert_hub, *OPTIONS, "refine.trained=norms"))
    from epmq_cli.pipeline import steps

    models, model, _ = steps.open_models(job)
    names = job.refine.names(model, models.source.names)  # type: ignore[union-attr]
    assert names
    assert all("LayerNorm" in name or name.endswith("bias") for name in names)
    assert any(name.endswith("LayerNorm.weight") for name in names)
    assert entry(tmp_path / "run")["trials"]


def test_it_needs_samples_memory_and_equal_layers(bert_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 4 calibration samples, but refine=distill needs 5"):
        run_in(tmp_path / "few", bert_hub, *OPTIONS, "calib.samples=4")
    with pytest.raises(ConfigError, match=r"got calib.student=disk; use calib.student=memory"):
        make_job(config(bert_hub, *OPTIONS, "calib.student=disk"))
    slices = "merge.slices=[{expert: first, layers: [0, 1]}]"
    with pytest.raises(ConfigError, match="use refine=none"):
        make_job(config(bert_hub, *OPTIONS, "guidance=merged", "merge=passthrough", slices))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("refine.lr=[]", "such as"),
        ("refine.lr=[0.1,2]", r"refine.lr must be a number in \(0, 1\], got 2"),
        ("refine.lr=fast", "auto, a number or a list"),
        ("refine.epochs=-1", r"refine.epochs must be a whole number in \[0"),
        ("refine.epochs=0", "refine.epochs and refine.packed_epochs are both 0; use refine=none, or raise one"),
        ("refine.trained=some", "refine.trained must be one of all, lora, norms"),
    ],
)
def test_wrong_options_are_named(value: str, message: str, bert_hub: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_job(config(bert_hub, *OPTIONS, value))
