"""Oracles: transformers' CLIPModel of an expert that trained all of it, and norms by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from epmq_cli.errors import ModelError
from epmq_cli.families.text_tower import drifts
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from tests.conftest import CLASSES, drifted
from tests.helpers.edited import copied, edit_tensors
from tests.helpers.hubs import config

TEMPLATE = "suite.tasks.first.templates=['a photo of a {}']"


@pytest.fixture
def trained(clip_hub: Path, tmp_path: Path) -> Path:
    """A copy whose first expert is a completely trained CLIPModel; the second has a vision tower."""
    from transformers import CLIPModel

    found = copied(clip_hub, tmp_path / "hub")
    drifted(CLIPModel.from_pretrained(found / "base"), 7, 0.2).save_pretrained(found / "first")  # type: ignore[operator]
    return found


def logits_of(hub: Path, *overrides: str) -> torch.Tensor:
    """epmq's logits of the first expert on its test pictures."""
    job = make_job(config(hub, TEMPLATE, *overrides))
    models, model, _ = steps.open_models(job)
    task = steps.prepare_tasks(job, model, models)[0]
    copy_into(model, models.source.model("first"))
    with torch.inference_mode():
        return job.family.logits(model, job.family.features(model, task.collate(list(task.samples.inputs))), task.head)


def transformers_logits(hub: Path) -> torch.Tensor:
    """The logits of the expert's folder in transformers."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    whole = CLIPModel.from_pretrained(hub / "first").eval()
    job = make_job(config(hub))
    pictures = list(job.suite.members[0].data.load("test").inputs)
    batch: Any = AutoTokenizer.from_pretrained(hub / "base")(
        [f"a photo of a {name}" for name in CLASSES], padding=True, return_tensors="pt"
    )
    pixels = AutoImageProcessor.from_pretrained(hub / "base")(images=pictures, return_tensors="pt")
    with torch.inference_mode():
        logits: torch.Tensor = whole(**batch, **pixels).logits_per_image / whole.logit_scale.exp() * 100
    return logits


def test_a_head_from_the_experts_text_tower_reproduces_its_logits(trained: Path) -> None:
    wanted = transformers_logits(trained)
    torch.testing.assert_close(logits_of(trained, "++suite.heads=expert"), wanted, rtol=1e-4, atol=2e-3)
    assert (logits_of(trained) - wanted).abs().max() > 1


def test_trained_parts_outside_the_vision_tower_are_reported_with_their_size(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "epmq"):
        steps.open_models(make_job(config(trained)))
    (line,) = (record for record in caplog.records if "outside its vision tower" in record.getMessage())
    assert line.levelname == "WARNING"
    base, first = (load_file(trained / name / "model.safetensors") for name in ("base", "first"))
    names = [name for name in base if name.startswith("text_model.") and "position_ids" not in name]
    moved = sum(float((first[name] - base[name]).square().sum()) for name in names) ** 0.5
    size = moved / sum(float(base[name].square().sum()) for name in names) ** 0.5
    assert f"text_model {size:.1%}, text_projection " in line.getMessage()
    assert "set suite.heads=expert to use its own; its visual projection is merged" in line.getMessage()
    caplog.clear()
    with caplog.at_level(logging.INFO, "epmq"):
        steps.open_models(make_job(config(trained, "++suite.heads=expert")))
    (line,) = (record for record in caplog.records if "outside its vision tower" in record.getMessage())
    assert (line.levelname, "its own text tower makes its head" in line.getMessage()) == ("INFO", True)


def test_a_projection_is_merged_if_trained_and_defaults_to_the_base(trained: Path, clip_hub: Path) -> None:
    source = steps.open_models(make_job(config(trained)))[0].source
    name = "visual_projection.weight"
    base, first = (load_file(trained / folder / "model.safetensors")[name] for folder in ("base", "first"))
    assert torch.equal(source.expert("first", name), first)
    assert torch.equal(source.expert("second", name), base)
    assert name not in steps.open_models(make_job(config(clip_hub)))[0].source.names


def test_rounding_to_a_smaller_type_does_not_count_as_training(clip_hub: Path, tmp_path: Path) -> None:
    found = copied(clip_hub, tmp_path / "hub")
    tensors = load_file(found / "base" / "model.safetensors")
    halves = {name: x.half() if x.is_floating_point() else x for name, x in tensors.items()}
    (found / "half").mkdir()
    save_file(halves, found / "half" / "model.safetensors", metadata={"format": "pt"})
    (found / "half" / "config.json").write_bytes((found / "base" / "config.json").read_bytes())
    base, half = ModelFolder(found / "base", "base"), ModelFolder(found / "half", "expert")
    assert drifts(base, half) == {}
    assert list(drifts(base, ModelFolder(found / "first", "expert"))) == []
    halves["logit_scale"] += 1
    save_file(halves, found / "half" / "model.safetensors", metadata={"format": "pt"})
    moved = drifts(base, ModelFolder(found / "half", "expert"))
    assert moved["logit_scale"] == pytest.approx(1 / float(tensors["logit_scale"]), rel=1e-3)
    assert list(moved) == ["logit_scale"]


def test_a_text_tower_of_another_shape_cannot_make_the_head(trained: Path) -> None:
    def more_words(tensors: dict[str, torch.Tensor]) -> None:
        name = "text_model.embeddings.token_embedding.weight"
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    edit_tensors(trained / "first", more_words)
    with pytest.raises(ModelError, match=r"token_embedding.weight is \[18, 32\] in the expert and \[17, 32\] in the"):
        logits_of(trained, "++suite.heads=expert")
    logits_of(trained)
