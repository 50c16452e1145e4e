"""Oracles: the merge computed step by step, the same run without a cache, and closed forms for whole runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from epmq_cli.calibrate.merge_data import ExpertMeasurements
from epmq_cli.errors import ConfigError
from epmq_cli.merge.coefficients import LearnedCoefficients
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.pipeline import cached_steps, steps
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import Job, make_job
from epmq_cli.store.cache import Cache
from tests.helpers.hubs import config, run_in
from tests.helpers.minihub import build, hub_of
from tests.helpers.tiers import only, slow

PLAIN = ("guidance=merged", "quant=none", "eval.samples=4", "calib.samples=6", "calib.batch_size=3")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))


def measured(hub: Path, *overrides: str) -> tuple[Job, SuiteModels, ExpertMeasurements | None]:
    """A job, its models, and the data on which its merge measures the experts."""
    job = make_job(config(hub, *PLAIN, *overrides))
    models, model, _ = steps.open_models(job)
    tasks = steps.prepare_tasks(job, model, models)
    drawn = steps.calibration_batches(job, models.base.path)
    context = RunContext.of(job)
    batches = guide.run_teachers(context, model, models.source, drawn).batches
    return job, models, steps.merge_data(context, model, models.source, batches, tasks)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("t5", "regmean"),
        slow(("llama", "regmean")),
        ("deberta", "fisher"),
        ("t5", "regmean_pp"),
        slow(("llama", "regmean_pp")),
    ],
)
def test_equal_experts_stay_unchanged(kind: str, method: str, tmp_path: Path) -> None:
    hub = build(tmp_path / "hub", kind)
    shutil.rmtree(hub / "second")
    shutil.copytree(hub / "first", hub / "second")
    job, models, data = measured(hub, f"merge={method}")
    for name, tensor in LazyMerge(models.source, job.merge, torch.float32, data):
        torch.testing.assert_close(tensor, models.source.expert("first", name), rtol=1e-5, atol=1e-6)


def learned(name: str, steps: int) -> tuple[str, ...]:
    return (f"merge={name}", f"merge.steps={steps}", "merge.lr=0.02", "merge.batch_size=2")


@pytest.mark.parametrize(
    ("kind", "name"), [("clip", "adamerging"), ("bert", "soft_merging"), slow(("vit", "soft_merging"))]
)
def test_learned_coefficients_lower_the_loss_on_the_calibration_samples(
    kind: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub, losses = hub_of(kind, request, tmp_path / "hub"), []
    for steps_ in (0, 20):
        job, models, data = measured(hub, *learned(name, steps_))
        assert data is not None and isinstance(job.merge, LearnedCoefficients)
        merged = dict(LazyMerge(models.source, job.merge, torch.float32, data))
        of_batches = job.merge.losses(models.source, data, data.batches)
        data.put(merged.items())
        rows = slice(0, 3)
        losses.append(
            sum(
                float(loss(data.logits(task, batch)[rows], rows).sum())
                for task, group in data.batches.items()
                for batch, loss in zip(group, of_batches[task], strict=True)
            )
        )
    assert losses[1] < losses[0]


@pytest.mark.parametrize("kind", only(("bert", "t5"), ["clip", "bert", "t5", "llama"]))
def test_esm_merges_every_kind(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    job, models, data = measured(hub_of(kind, request, tmp_path / "hub"), "merge=esm")
    assert data is not None
    linears = {f"{name}.weight" for group in data.linear_groups() for name in group}
    for name, tensor in LazyMerge(models.source, job.merge, torch.float32, data):
        assert torch.isfinite(tensor).all()
        assert name not in linears or not torch.equal(tensor, models.source.base(name))


@pytest.mark.parametrize(
    "method", [slow(pytest.param(("merge=fisher",))), learned("soft_merging", 3), ("merge=regmean_pp",)]
)
def test_a_merge_from_the_cache_is_the_merge(method: tuple[str, ...], bert_hub: Path, tmp_path: Path) -> None:
    options = (*PLAIN, *method, "cache=1MB")
    first = run_in(tmp_path / "first", bert_hub, *options)
    again = run_in(tmp_path / "again", bert_hub, *options)
    assert json.loads((tmp_path / "again" / "metrics.json").read_text())["cache"] == {"found": 7, "made": 0}
    plain = run_in(tmp_path / "plain", bert_hub, *options, "cache=false")
    files = {(checkpoint / "model.safetensors").read_bytes() for checkpoint in (first, again, plain)}
    assert len(files) == 1


def test_the_key_of_a_merge_depends_on_the_data_its_method_needs(bert_hub: Path, tmp_path: Path) -> None:
    job, models, data = measured(bert_hub, "merge=fisher")
    assert data is not None

    def key(method: str, data: ExpertMeasurements) -> str:
        cached = cached_steps.CachedSteps(Cache(tmp_path, 10**7), job, models, torch.float32)
        cached._measured = cached_steps._measured_on(data, make_job(config(bert_hub, f"merge={method}")).merge.needs)
        return json.dumps(cached._merge, sort_keys=True)

    fewer = replace(data, batches={**data.batches, "second": data.batches["second"][1:]})
    swapped = replace(data, batches=dict(zip(data.batches, reversed(data.batches.values()), strict=True)))
    moved = {task: {name: tensor + 1 for name, tensor in head.items()} for task, head in data.heads.items()}
    for method, gradients in (("fisher", True), ("regmean", False), ("adamerging", True), ("regmean_pp", False)):
        assert key(method, replace(data)) == key(method, data)
        assert len({key(method, other) for other in (data, fewer, swapped)}) == 3
        assert (key(method, replace(data, heads=moved)) != key(method, data)) == gradients


def test_the_key_of_a_random_merge_depends_on_the_seed(clip_hub: Path, tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        job = make_job(config(clip_hub, *overrides))
        models = SuiteModels(job.suite, job.family)
        return json.dumps(cached_steps.CachedSteps(Cache(tmp_path, 10**7), job, models, torch.float32)._merge)

    assert key("merge=ties", "seed=1") == key("merge=ties")
    for name in ("dare_linear", "adamerging", "soft_merging"):
        assert key(f"merge={name}", "seed=1") != key(f"merge={name}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("+merge.weights.frist=2", "merge.weights has no option 'frist', .*; did you mean first?"),
        ("merge.scale=-1", "merge.scale must be a number"),
        ("+merge.sclae=1", "merge has no option 'sclae', .*; did you mean scale?"),
    ],
)
def test_options_are_checked_first(option: str, message: str, clip_hub: Path) -> None:
    gone = ("suite.base=gone", "suite.tasks.first.expert=gone")
    with pytest.raises(ConfigError, match=message):
        make_job(config(clip_hub, *gone, option))


@pytest.mark.parametrize(("kind", "method"), [("t5", "fisher"), ("llama", "adamerging"), ("llama", "soft_merging")])
def test_gradients_are_refused_without_heads(kind: str, method: str, tmp_path: Path) -> None:
    hub, family = build(tmp_path / "hub", kind), {"t5": "t5", "llama": "causal_lm"}[kind]
    with pytest.raises(
        ConfigError, match=f"merge={method} needs gradients .* family {family} have no heads; use another"
    ):
        make_job(config(hub, f"merge={method}"))
