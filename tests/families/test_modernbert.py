"""Oracles: ModernBertForSequenceClassification of transformers, and the mean over the tokens without padding by
hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertForSequenceClassification

from epmq_cli.checkpoint.task_heads import head_problems, read_heads
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.families.modernbert import MODERNBERT
from epmq_cli.families.structure import MEAN, pooled
from epmq_cli.models.model_folder import ModelFolder, TensorInfo
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import calibration, steps
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job
from tests.commands.test_merge import merged
from tests.helpers.hubs import config, run_in
from tests.helpers.minihub import Hub, modernbert

CPU = torch.device("cpu")
POOLINGS = {"mean": "modernbert", "cls": "modernbert-cls"}


def test_the_mean_ignores_padding() -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True], [True, True, False]])
    wanted = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    torch.testing.assert_close(pooled(hidden, MEAN, mask), wanted)
    torch.testing.assert_close(pooled(hidden, MEAN, None), hidden.mean(1))
    assert torch.equal(pooled(hidden, 0, mask), hidden[:, 0])
    assert pooled(hidden, None, mask) is hidden


@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_match_transformers(pooling: str, hub: Hub) -> None:
    """Texts of several lengths, so some are padded."""
    job = make_job(config(hub(POOLINGS[pooling])))
    models, model, _ = steps.open_models(job)
    task = steps.prepare_tasks(job, model, models)[0]
    copy_into(model, models.source.model("first"))
    batch = task.collate(list(task.samples.inputs))
    assert not batch["attention_mask"].all()
    whole = ModernBertForSequenceClassification.from_pretrained(hub(POOLINGS[pooling]) / "first").eval()
    assert whole.config.classifier_pooling == pooling
    with torch.inference_mode():
        logits = job.family.logits(model, job.family.features(model, batch), task.head)
        torch.testing.assert_close(logits, whole(**batch).logits)


def saved(folder: Path, **settings: Any) -> tuple[Any, ModelFolder]:
    """A small classifier, and its folder as an expert."""
    torch.manual_seed(0)
    made = ModernBertForSequenceClassification(ModernBertConfig(**{**modernbert("cls").config.to_dict(), **settings}))
    with torch.no_grad():
        for parameter in made.head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    made.eval().save_pretrained(folder)
    return made, ModelFolder(folder, "expert of task t")


def features() -> Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "settings",
    [
        {"classifier_bias": True, "norm_bias": True},
        {"classifier_activation": "relu", "norm_eps": 0.1},
    ],
)
def test_the_head_follows_the_settings_of_the_config(settings: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the modules of the head in transformers."""
    made, expert = saved(tmp_path / "expert", **settings)
    head = MODERNBERT.head(made, tmp_path, steps.Task("t", "expert", object()), expert, CPU)  # type: ignore[arg-type]
    with torch.inference_mode():
        wanted = made.classifier(made.head(features()))
        torch.testing.assert_close(MODERNBERT.logits(made, features(), head), wanted)


def test_a_head_without_its_norm_or_with_a_norm_of_another_size_is_refused(tmp_path: Path) -> None:
    made, expert = saved(tmp_path / "expert")
    modules = MODERNBERT.tasks.modules  # type: ignore[attr-defined]
    infos = dict(expert.infos)
    expert.infos.pop("head.norm.weight")
    with pytest.raises(ModelError, match=r"expert of task t: .* has no head.norm.weight, the head of its task"):
        modules.read(expert, 32)
    expert.infos.update(infos)
    stored = {f"t.{part}": TensorInfo(tuple(tensor.shape), "F32") for part, tensor in modules.read(expert, 32).items()}
    assert not list(head_problems(stored, ["t"], MODERNBERT, made.config))
    stored["t.norm_weight"] = TensorInfo((31,), "F32")
    assert list(head_problems(stored, ["t"], MODERNBERT, made.config)) == [
        "t.norm_weight is [31], config.json implies [32]"
    ]
    del stored["t.norm_weight"]
    assert list(head_problems(stored, ["t"], MODERNBERT, made.config)) == ["t.norm_weight is missing"]


@pytest.mark.parametrize("setting", ["classifier_pooling", "classifier_activation", "local_attention"])
def test_an_expert_with_another_setting_than_the_base_is_refused(setting: str, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(hub("modernbert") / "first", tmp_path / "first")
    path, other = tmp_path / "first" / "config.json", {"classifier_pooling": "cls", "local_attention": 8}
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: other.get(setting, "relu")}))
    job = make_job(config(hub("modernbert"), f"suite.tasks.first.expert={tmp_path / 'first'}"))
    with pytest.raises(ModelError, match=f"{setting} is .* in its config and .* in the base's"):
        steps.open_models(job)


def test_a_solved_head_is_closer_to_the_experts_logits_and_keeps_dense_and_norm(hub: Hub) -> None:
    """Compared with the same head before solving."""
    job = make_job(config(hub("modernbert"), "guidance=feature", "guidance.heads=own"))
    models, model, _ = steps.open_models(job)
    tasks = steps.prepare_tasks(job, model, models)
    drawn = steps.calibration_batches(job, models.base.path)
    context = RunContext.of(job)
    taught = calibration.run_teachers(context, model, models.source, drawn)
    copy_into(model, models.source.model("second"))
    before, after = tasks[0], calibration.solve_heads(context, model, taught, tasks, job.guidance)[0]
    assert before.head.keys() == after.head.keys()
    changed = {part for part in before.head if not torch.equal(before.head[part], after.head[part])}
    assert changed == {"weight", "bias"}
    with torch.inference_mode():
        own = calibration.features(job.family, model, drawn["first"])
        wanted = job.family.logits(model, taught.features["first"], before.head)
        errors = [(job.family.logits(model, own, task.head) - wanted).square().sum() for task in (before, after)]
    assert errors[1] < 0.5 * errors[0]


def test_a_checkpoint_stores_all_parts_of_its_heads(hub: Hub, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path, hub("modernbert"), "guidance=merged", "quant=rtn", "eval.samples=4")
    job = make_job(config(hub("modernbert")))
    heads = read_heads(checkpoint, job.suite, job.family, CPU)
    expert = load_file(hub("modernbert") / "first" / "model.safetensors")
    assert set(heads["first"]) == {"weight", "bias", "dense_weight", "norm_weight"}
    assert torch.equal(heads["first"]["norm_weight"], expert["head.norm.weight"])
    assert json.loads((tmp_path / "metrics.json").read_text())["scores"]["average"].keys() >= {
        "experts",
        "merged",
        "quantized",
    }


def test_mixed_widths_are_refused_first(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ConfigError, match="transformers cannot load this family with two formats in one checkpoint"):
        make_job(config(hub("modernbert"), "bits=3.5", f"suite.base={tmp_path / 'none'}"))


def test_a_merge_with_a_masked_language_model_keeps_the_head_of_the_base(hub: Hub, tmp_path: Path) -> None:
    """The head's tensors are those of the base, although their names are those of a classifier's dense layer and
    norm."""
    shutil.copytree(hub("modernbert"), tmp_path / "hub")
    base = tmp_path / "hub" / "base"
    encoder = ModernBertForSequenceClassification.from_pretrained(base)
    masked = ModernBertForMaskedLM(encoder.config)
    masked.model.load_state_dict(encoder.model.state_dict())
    masked.save_pretrained(base)
    checkpoint = merged(tmp_path / "hub", tmp_path / "run", f"suite.base={base}")
    found, own = load_file(checkpoint / "model.safetensors"), load_file(base / "model.safetensors")
    assert found.keys() == own.keys()
    kept = {name for name in own if torch.equal(found[name], own[name])}
    assert kept == {"head.dense.weight", "head.norm.weight", "decoder.bias"}
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == ["ModernBertForMaskedLM"]
