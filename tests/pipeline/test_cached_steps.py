"""Oracle: the same run without a cache, byte for byte and score for score."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from epmq_cli.errors import ConfigError
from epmq_cli.merge.average import Average
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.pipeline import cached_steps, keys
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.store.cache import Cache
from tests.helpers.hubs import config, run_in
from tests.helpers.minihub import build
from tests.helpers.tiers import first

KEEPING = ("cache=1MB", "eval.samples=10")
ALL = 2 + 2 + 2 + 1  # scores of base, experts and merge on two tasks, and the merge itself


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(checkpoint: Path) -> dict[str, bytes]:
    """The files of a checkpoint."""
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}


def metrics(checkpoint: Path) -> Any:
    """metrics.json of the run that wrote a checkpoint."""
    return json.loads((checkpoint.parent / "metrics.json").read_text())


def same(first: Path, second: Path) -> bool:
    """Whether two runs have equal files and scores."""
    return contents(first) == contents(second) and metrics(first)["scores"] == metrics(second)["scores"]


@pytest.fixture(scope="session")
def hubs(clip_hub: Path, bert_hub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A hub for each kind of result: T5's experts generate answers, those of BERT have heads."""
    made = {kind: build(tmp_path_factory.mktemp(kind), kind) for kind in ("t5", "llama")}
    return {"clip": clip_hub, "bert": bert_hub, **made}


@pytest.mark.parametrize(
    ("kind", "entries"), first(1, [("bert", ALL + 2), ("clip", ALL), ("t5", ALL + 2), ("llama", ALL)])
)
def test_a_run_is_the_same_with_an_empty_cache_a_full_one_or_none(
    kind: str, entries: int, hubs: dict[str, Path], tmp_path: Path
) -> None:
    options = ("guidance=feature", "guidance.lam=0.01", "merge=ties")
    plain = run_in(tmp_path / "plain", hubs[kind], *options, "eval.samples=10")
    empty = run_in(tmp_path / "empty", hubs[kind], *options, *KEEPING)
    full = run_in(tmp_path / "full", hubs[kind], *options, *KEEPING)
    assert metrics(plain)["cache"] is None
    assert metrics(empty)["cache"] == {"found": 0, "made": entries}
    assert metrics(full)["cache"] == {"found": entries, "made": 0}
    assert same(plain, empty)
    assert same(plain, full)


@pytest.mark.slow
def test_jobs_of_a_sweep_share_results(bert_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path / "first", bert_hub, *KEEPING)
    jobs = {  # the number of results that they find in the cache
        "bits=3": ALL,
        "guidance.lam=0.5": ALL,
        "merge.scale=0.5": 4,
        "merge=ties": 4,
        "pack.dtype=float16": 0,
        "eval.batch_size=7": 1,
        "eval.samples=9": 1,
        "suite.tasks.first.max_length=12": 1 + 3,
    }
    for job, found in jobs.items():
        assert metrics(run_in(tmp_path / job, bert_hub, *KEEPING, job))["cache"]["found"] == found, job


CHANGES = [
    ("clip", "first", "q_proj.weight", 2 + 1),  # found: all scores of the base, and those of the other expert
    ("clip", "base", "vision_model.encoder.layers.0.self_attn.q_proj.weight", 0),
    ("bert", "first", "classifier.weight", 1 + 1),  # the base is scored with this expert's head
]


@pytest.mark.parametrize(("kind", "model", "tensor", "found"), first(1, CHANGES))
def test_results_of_a_changed_model_are_recomputed(
    kind: str, model: str, tensor: str, found: int, hubs: dict[str, Path], tmp_path: Path
) -> None:
    hub = tmp_path / "hub"
    shutil.copytree(hubs[kind], hub)
    suite = hub / "configs" / "suite" / "mini.yaml"
    suite.write_text(suite.read_text().replace(str(hubs[kind]), str(hub)))
    run_in(tmp_path / "before", hub, *KEEPING)
    file = hub / model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    next(value for name, value in tensors.items() if name.endswith(tensor))[0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    after = run_in(tmp_path / "after", hub, *KEEPING)
    assert metrics(after)["cache"] == {"found": found, "made": ALL - found}
    assert same(after, run_in(tmp_path / "plain", hub, "eval.samples=10"))


@pytest.mark.slow
def test_other_calibration_samples_change_only_the_teachers(bert_hub: Path, tmp_path: Path) -> None:
    options = ("guidance=feature", "calib.samples=8")
    keeping = (*KEEPING, "eval.samples=null")  # the seed would also choose the test samples
    run_in(tmp_path / "first", bert_hub, *options, *keeping)
    second = run_in(tmp_path / "second", bert_hub, *options, *keeping, "seed=1")
    assert metrics(second)["cache"] == {"found": ALL, "made": 2}
    assert same(second, run_in(tmp_path / "plain", bert_hub, *options, "eval.samples=null", "seed=1"))


@pytest.mark.slow
def test_copies_of_the_models_share_results(clip_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path / "first", clip_hub, *KEEPING)
    for name in ("base", "first"):
        shutil.copytree(clip_hub / name, tmp_path / "models" / name)
    folder = tmp_path / "models"
    places = (f"suite.base={folder / 'base'}", f"suite.tasks.first.expert={folder / 'first'}")
    assert metrics(run_in(tmp_path / "again", clip_hub, *KEEPING, *places))["cache"]["found"] == ALL


@pytest.mark.slow
def test_another_version_recomputes_everything(clip_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(tmp_path / "first", clip_hub, *KEEPING)
    monkeypatch.setattr(keys, "installed_version", lambda name: "0.0.0")
    assert metrics(run_in(tmp_path / "second", clip_hub, *KEEPING))["cache"]["found"] == 0


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("installed_version", lambda name: "0.0.0"),
        ("hash_code", lambda: "edited"),
        ("_processor", lambda: "another"),
    ],
)
def test_keys_depend_on_packages_code_and_machine(name: str, replacement: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys.environment(torch.device("cpu"))
    monkeypatch.setattr(keys, name, replacement)
    after = keys.environment(torch.device("cpu"))
    assert before != after
    assert json.dumps(before) != json.dumps(after)


def test_keys_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys.environment(torch.device("cpu"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert keys.environment(torch.device("cpu")) != before


def test_damaged_entries_are_recomputed(clip_hub: Path, tmp_path: Path, cache: Path) -> None:
    first = run_in(tmp_path / "first", clip_hub, *KEEPING)
    for path in (cache / "jobs").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    second = run_in(tmp_path / "second", clip_hub, *KEEPING)
    assert metrics(second)["cache"] == {"found": 0, "made": ALL}
    assert same(first, second)


@pytest.mark.slow
def test_an_entry_that_another_job_evicts_is_recomputed(
    bert_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_in(tmp_path / "first", bert_hub, *KEEPING, "guidance=feature")
    real, removed = safetensors.torch.load_file, []

    def load_file(path: Path, **options: Any) -> Any:
        path.unlink()
        removed.append(path)
        return real(path, **options)

    monkeypatch.setattr(safetensors.torch, "load_file", load_file)
    assert same(first, run_in(tmp_path / "second", bert_hub, *KEEPING, "guidance=feature"))
    assert removed


def test_a_model_that_changes_during_the_run_is_not_cached(
    clip_hub: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(clip_hub / "first", tmp_path / "first")
    file, real = tmp_path / "first" / "config.json", cached_steps.hash_tensors

    def touch(*arguments: Any) -> str:
        file.write_text(file.read_text() + " ")
        return real(*arguments)

    monkeypatch.setattr(cached_steps, "hash_tensors", touch)
    run_in(tmp_path / "run", clip_hub, *KEEPING, f"suite.tasks.first.expert={tmp_path / 'first'}")
    assert not list((cache / "jobs").glob("*.json"))


def test_without_a_cache_its_folder_stays_empty(clip_hub: Path, tmp_path: Path, cache: Path) -> None:
    run_in(tmp_path / "run", clip_hub, "eval.samples=10")
    assert not (cache / "jobs").exists()


@pytest.mark.slow
def test_merges_of_users_methods_are_not_cached(
    clip_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[Average.__module__])
    monkeypatch.setattr(Average, "__module__", "mine")
    for folder, found in (("first", 0), ("second", 4)):
        checkpoint = run_in(tmp_path / folder, clip_hub, *KEEPING, "merge=average")
        assert metrics(checkpoint)["cache"]["found"] == found


@pytest.mark.slow
def test_methods_without_options_have_different_keys(clip_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path / "average", clip_hub, *KEEPING, "merge=average")
    assert metrics(run_in(tmp_path / "none", clip_hub, *KEEPING, "merge=none"))["cache"] == {"found": 4, "made": 2}


def test_a_base_with_padded_rows_depends_on_the_experts(clip_hub: Path, tmp_path: Path) -> None:
    job = make_job(config(clip_hub))
    models, _, dtype = steps.open_models(job)
    common = cached_steps.CachedSteps(Cache(tmp_path / "jobs", 10**7), job, models, dtype)
    assert common._base["vocabulary"] == []
    models.source.padded["embeddings"] = 100
    assert common._base["vocabulary"] == [common.files["expert of first"], common.files["expert of second"]]


def test_a_cached_merge_equals_the_merge(clip_hub: Path, tmp_path: Path) -> None:
    job = make_job(config(clip_hub, "merge=ties", "pack.dtype=bfloat16"))
    models, _, dtype = steps.open_models(job)
    kept = cached_steps.CachedSteps(Cache(tmp_path / "jobs", 10**7), job, models, dtype).merged()
    made = LazyMerge(models.source, job.merge, dtype)
    assert isinstance(kept, cached_steps.CachedMerge)
    for name, tensor in made:
        assert torch.equal(kept.tensor(name), tensor)


def test_the_option_is_a_size_or_false(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path))
    assert cached_steps.open_cache(False) is None
    assert cached_steps.open_cache(None) is None
    opened = cached_steps.open_cache("1MB")
    assert opened is not None
    opened.value({"kind": "any"}, lambda: 1)
    assert [path.name for path in tmp_path.iterdir()] == ["jobs"]
    for wrong, message in ((True, "or false, got true"), (5, "such as 5GB, got 5"), ("much", "got 'much'")):
        with pytest.raises(ConfigError, match=message):
            cached_steps.open_cache(wrong)
