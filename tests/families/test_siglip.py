"""Oracles: SiglipModel of transformers, and the numbers of a lone expert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from epmq_cli.errors import ModelError
from epmq_cli.families.family import load_model
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from tests.conftest import CLASSES, TASKS, drifted, write_pictures, write_suite
from tests.helpers.hubs import config, lone_expert, run_in
from tests.helpers.minihub import IDS, SIZE, tokenizer

LENGTH = 10  # tokens that the text tower reads
STEM = ("embeddings.", "head.probe", "head.attention.")
"""What no step solves."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SiglipModel, two vision towers with its unsolved tensors, and their tasks."""
    import transformers as t

    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    vision = {**SIZE, "image_size": 16, "patch_size": 8}
    text = {**SIZE, **IDS, "max_position_embeddings": LENGTH, "projection_size": 32}
    base = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)).eval()
    base.save_pretrained(folder / "base")
    tokenizer(folder / "base", end=True)
    t.SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "base")
    generator, tasks = np.random.default_rng(0), {}
    for seed, task in enumerate(TASKS):
        tower: Any = drifted(base.vision_model, seed)
        own = dict(base.vision_model.named_parameters())
        copy_into(tower, {name: tensor for name, tensor in own.items() if name.startswith(STEM)})
        tower.save_pretrained(folder / task)
        data = write_pictures(folder / f"{task}.npz", generator, 30, 20)
        tasks[task] = {"expert": str(folder / task), "data": data, "classes": CLASSES, "templates": ["a photo of a {}"]}
    write_suite(folder, {"family": "auto", "base": str(folder / "base"), "tasks": tasks})
    return folder


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_classes_are_ranked_as_by_the_whole_model(hub: Path) -> None:
    job = make_job(config(hub))
    assert job.family.name == "siglip"
    models, model, _ = steps.open_models(job)
    task, whole = steps.prepare_tasks(job, model, models)[0], AutoModel.from_pretrained(hub / "base").eval()
    texts = [f"a photo of a {name}" for name in CLASSES]
    ids = AutoTokenizer.from_pretrained(hub / "base")(texts, padding="max_length", max_length=LENGTH)["input_ids"]
    with torch.inference_mode():
        given = whole(input_ids=torch.tensor(ids), pixel_values=pixels()).logits_per_image
        found = job.family.logits(model, job.family.features(model, {"pixel_values": pixels()}), task.head)
    wanted = (given - whole.logit_bias) / whole.logit_scale.exp()  # the cosines
    torch.testing.assert_close(found / 100, wanted.detach(), rtol=1e-3, atol=1e-5)


def test_a_lone_expert_is_reproduced(hub: Path) -> None:
    far, found, wanted = lone_expert(hub, "guidance.readout_weight=1", "calib.samples=30")
    assert (found - wanted).square().sum() < 1e-4 * (far - wanted).square().sum()


def test_a_checkpoint_reloads_in_plain_transformers_with_equal_outputs(hub: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path, hub, "guidance=feature", "bits=4")
    family = make_job(config(hub)).family
    public: Any = AutoModel.from_pretrained(checkpoint).eval().requires_grad_(False)  # torch's attention goes by it
    own = load_model(family, checkpoint, torch.device("cpu"))
    with torch.inference_mode():
        wanted = family.features(own, {"pixel_values": pixels()})
        found = public.get_image_features(pixel_values=pixels()).pooler_output
        assert torch.equal(found, wanted)
    described = json.loads((checkpoint / "config.json").read_text())
    assert described["architectures"] == ["SiglipModel"]
    packed = {name for name in load_file(checkpoint / "model.safetensors") if name.endswith("weight_packed")}
    assert len(packed) == 12  # of two blocks; the head and the text tower stay dense


def test_a_tower_without_its_pooling_head_is_refused(hub: Path, tmp_path: Path) -> None:
    expert = shutil.copytree(hub / "first", tmp_path / "first")
    described = json.loads((expert / "config.json").read_text()) | {"vision_use_head": False}
    (expert / "config.json").write_text(json.dumps(described))
    tensors = load_file(expert / "model.safetensors")
    save_file(tensors, expert / "model.safetensors", {"format": "pt"})
    job = make_job(config(hub, f"suite.tasks.first.expert={expert}"))
    with pytest.raises(ModelError, match=r"has no pooling head \(vision_use_head: false\)"):
        SuiteModels(job.suite, job.family)
