"""Oracles: the merged model that a run starts from, and transformers, which loads the folder like that of the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers as t
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPModel

from epmq_cli.commands.merge import merge
from epmq_cli.config.instantiate import conf_dir
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.report.metrics_json import schema
from tests.helpers.architectures import ENCODERS, REFUSED, built
from tests.helpers.hubs import config, merge_config
from tests.helpers.minihub import IDS, SIZE, build
from tests.helpers.tiers import only


def merged(hub: Path, folder: Path, *overrides: str) -> Path:
    """The checkpoint of a merge."""
    folder.mkdir()
    merge(merge_config(hub, *overrides), folder, list(overrides))
    return folder / "checkpoint"


METHODS = ("average", "task_arithmetic", "ties", "none", "tsv_m", "dare_linear", "dare_ties")


@pytest.mark.parametrize("method", only(("average", "none", "tsv_m", "dare_ties"), METHODS))
def test_the_folder_holds_the_merge_with_the_names_of_the_base(method: str, clip_hub: Path, tmp_path: Path) -> None:
    checkpoint = merged(clip_hub, tmp_path / "run", f"merge={method}")
    job = make_job(config(clip_hub, f"merge={method}"))
    source = SuiteModels(job.suite, job.family).source
    found, base = load_file(checkpoint / "model.safetensors"), load_file(clip_hub / "base" / "model.safetensors")
    assert found.keys() == base.keys()
    wanted = {source.stored_name(name): tensor for name, tensor in LazyMerge(source, job.merge, torch.float32)}
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted.get(name, base[name]).to(base[name].dtype))
    CLIPModel.from_pretrained(checkpoint)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    jsonschema.validate(metrics, schema())
    assert metrics["bytes"]["model_dense"] == sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_methods_that_need_data_are_refused_first(method: str, clip_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"merge={method} needs calibration data, .* use epmq run merge={method} "):
        merged(clip_hub, tmp_path / "run", f"merge={method}", "suite.base=gone")


def test_weights_of_unknown_tasks_are_refused_first(clip_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"merge.weights has no option 'frist', .*; did you mean first\?"):
        merged(clip_hub, tmp_path / "run", "merge=average", "merge.weights={frist: 2}", "suite.base=gone")


def test_shards_and_another_type(tmp_path: Path) -> None:
    checkpoint = merged(
        build(tmp_path / "hub", "llama"), tmp_path / "run", "pack.shard_size=20KB", "pack.dtype=bfloat16"
    )
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    assert {info.dtype for info in ModelFolder(checkpoint, "merge").infos.values()} == {"BF16"}
    assert AutoModelForCausalLM.from_pretrained(checkpoint).dtype == torch.bfloat16


def test_a_merge_that_fails_leaves_no_folder(clip_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> torch.Tensor:
        raise ModelError("expert of task first: it holds a NaN")

    monkeypatch.setattr(LazyMerge, "stored", broken)
    with pytest.raises(ModelError):
        merged(clip_hub, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_used_folder_is_refused(clip_hub: Path, tmp_path: Path) -> None:
    merged(clip_hub, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"already holds checkpoint and metrics.json"):
        merge(merge_config(clip_hub), tmp_path / "run", [])


def files(folder: Path, model: Any) -> None:
    """Writes a base with save_pretrained, and beside it two experts: its tensors with noise."""
    model.save_pretrained(folder / "base")
    stored = load_file(folder / "base" / "model.safetensors")
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        (folder / name).mkdir()
        shutil.copy(folder / "base" / "config.json", folder / name)
        moved = {
            key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
            for key, tensor in stored.items()
        }
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})


def merged_folders(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """The tensors of `epmq merge suite=causal_lm` with experts a and b."""
    experts = f"suite.experts={{a: {folder}/a, b: {folder}/b}}"
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        given = ["suite=causal_lm", f"suite.base={folder}/base", experts, "out=unused", *overrides]
        cfg = compose("merge", overrides=given)
    out = folder / "out"
    out.mkdir()
    merge(cfg, out, given)
    return load_file(out / "checkpoint" / "model.safetensors")


@pytest.mark.parametrize("kind", only(("bloom", "lfm2", "dinov2"), [*REFUSED, *sorted(ENCODERS)]))
def test_models_that_run_refuses_merge_exactly(kind: str, tmp_path: Path) -> None:
    """Oracle: the mean of the experts' files, tensor by tensor, for models that no family calibrates."""
    files(tmp_path, built(REFUSED[kind][0] if kind in REFUSED else ENCODERS[kind]))
    found = merged_folders(tmp_path, "merge=average")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert found.keys() == first.keys()
    for name, tensor in found.items():
        wanted = (first[name] + second[name]) / 2 if tensor.is_floating_point() else first[name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)


def test_a_model_of_another_family_is_refused_by_its_name(tmp_path: Path) -> None:
    """BERT, which belongs to family bert."""
    files(tmp_path, built(lambda: t.BertModel(t.BertConfig(**SIZE, vocab_size=IDS["vocab_size"]))))
    with pytest.raises(ModelError, match="holds a model of type bert, which family bert takes; set suite.family=bert"):
        merged_folders(tmp_path, "merge=average")
