"""Oracles: the merge made step by step, the same run without a cache, and closed forms that hold for whole runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from epmq_cli.calibrate.merge_data import ExpertMeasurements
from epmq_cli.errors import ConfigError
from epmq_cli.merge.engine import LazyMerge, SuiteModels
from epmq_cli.pipeline import cached_steps, steps
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline.job import Job, make_job
from epmq_cli.store.cache import Cache
from tests.hubs import config, run_in
from tests.minihub import build

PLAIN = ("guidance=merged", "quant=none", "eval.samples=4", "calib.samples=6", "calib.batch_size=3")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))


def measured(hub: Path, *overrides: str) -> tuple[Job, SuiteModels, ExpertMeasurements | None]:
    """A job, its models, and what its merge measures the experts on."""
    job = make_job(config(hub, *PLAIN, *overrides))
    models, model, _ = steps.open_models(job)
    tasks = steps.prepare_tasks(job, model, models)
    drawn = steps.calibration_batches(job, models.base.path)
    batches = guide.run_teachers(job, model, models.source, drawn).batches
    return job, models, steps.merge_data(job, model, models.source, batches, tasks, guide.micro_batcher(job))


@pytest.mark.parametrize(("kind", "method"), [("t5", "regmean"), ("llama", "regmean"), ("deberta", "fisher")])
def test_equal_experts_come_out_as_they_are(kind: str, method: str, tmp_path: Path) -> None:
    hub = build(tmp_path / "hub", kind)
    shutil.rmtree(hub / "second")
    shutil.copytree(hub / "first", hub / "second")
    job, models, data = measured(hub, f"merge={method}")
    for name, tensor in LazyMerge(models.source, job.merge, torch.float32, data):
        torch.testing.assert_close(tensor, models.source.expert("first", name), rtol=1e-5, atol=1e-6)


def test_a_merge_from_the_cache_is_the_merge(bert_hub: Path, tmp_path: Path) -> None:
    options = (*PLAIN, "merge=fisher", "cache=1MB")
    first = run_in(tmp_path / "first", bert_hub, *options)
    again = run_in(tmp_path / "again", bert_hub, *options)
    assert json.loads((tmp_path / "again" / "metrics.json").read_text())["cache"] == {"found": 7, "made": 0}
    plain = run_in(tmp_path / "plain", bert_hub, *options, "cache=false")
    files = {(checkpoint / "model.safetensors").read_bytes() for checkpoint in (first, again, plain)}
    assert len(files) == 1


@dataclass
class Keyed:
    """A method's key in the cache with other batches, heads, and options."""

    hub: Path
    folder: Path

    def key(self, *overrides: str, moved_head: bool = False) -> Any:
        job = make_job(config(self.hub, *PLAIN, *overrides))
        models, model, dtype = steps.open_models(job)
        tasks = steps.prepare_tasks(job, model, models)
        if moved_head:
            tasks[0] = replace(tasks[0], head={name: tensor + 1 for name, tensor in tasks[0].head.items()})
        batches = steps.calibration_batches(job, models.base.path)
        data = steps.merge_data(job, model, models.source, batches, tasks, guide.micro_batcher(job))
        cached = cached_steps.CachedSteps(Cache(self.folder, 10**7), job, models, dtype)
        cached._measured = {} if data is None else cached_steps._measured_on(data, job.merge.needs)
        return cached._merge


def test_the_key_of_a_merge_has_samples_and_heads_as_far_as_the_method_needs_them(
    bert_hub: Path, tmp_path: Path
) -> None:
    keyed = Keyed(bert_hub, tmp_path)
    for method, gradients in (("fisher", True), ("regmean", False)):
        key = keyed.key(f"merge={method}")
        assert keyed.key(f"merge={method}") == key
        assert all(keyed.key(f"merge={method}", option) != key for option in ("seed=1", "calib.samples=5"))
        assert (keyed.key(f"merge={method}", moved_head=True) != key) == gradients
    assert keyed.key("merge=ties", "seed=1") == keyed.key("merge=ties")
    assert keyed.key("merge=dare_linear", "seed=1") != keyed.key("merge=dare_linear")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("+merge.weights.frist=2", "merge.weights has no option 'frist', .*; did you mean first?"),
        ("merge.scale=-1", "merge.scale must be a number"),
        ("+merge.sclae=1", "merge has no option 'sclae', .*; did you mean scale?"),
    ],
)
def test_options_are_checked_before_any_model_is_opened(option: str, message: str, clip_hub: Path) -> None:
    gone = ("suite.base=gone", "suite.tasks.first.expert=gone")
    with pytest.raises(ConfigError, match=message):
        make_job(config(clip_hub, *gone, option))


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_fisher_is_refused_where_there_are_no_heads(kind: str, tmp_path: Path) -> None:
    hub, family = build(tmp_path / "hub", kind), {"t5": "t5", "llama": "causal_lm"}[kind]
    with pytest.raises(
        ConfigError, match=f"merge=fisher takes gradients .* family {family} have no heads; use another"
    ):
        make_job(config(hub, "merge=fisher"))
