"""Oracles: the features of an expert in open_clip, and the checkpoint as transformers and open_clip load it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, CLIPModel

from epmq_cli.commands.verify import verify
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from tests.conftest import TASKS, drifted, write_suite
from tests.helpers.hubs import config, run_in

MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 32, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def hub(clip_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An open_clip folder, two experts as state dicts of its image encoder, and the data of the CLIP hub."""
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "open_clip"
    (folder / "base").mkdir(parents=True)
    torch.manual_seed(0)
    base = open_clip.CLIP(**copy.deepcopy(MODEL)).eval()
    save_file(base.state_dict(), folder / "base" / "open_clip_model.safetensors")
    (folder / "base" / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    suite = OmegaConf.to_container(OmegaConf.load(clip_hub / "configs/suite/mini.yaml"))
    assert isinstance(suite, dict)
    for seed, task in enumerate(TASKS):
        tensors = drifted(base.visual, seed).state_dict()
        torch.save({f"model.visual.{name}": tensor for name, tensor in tensors.items()}, folder / f"{task}.pt")
        suite["tasks"][task]["expert"] = str(folder / f"{task}.pt")
    write_suite(folder, {**suite, "family": "open_clip", "base": str(folder / "base")})
    return folder


def test_an_expert_in_the_model_has_the_features_of_open_clip(hub: Path) -> None:
    job = make_job(config(hub))
    models, model, _ = steps.open_models(job)
    copy_into(model, {name: models.source.expert(TASKS[1], name) for name in models.source.names})
    expert = open_clip.CLIP(**copy.deepcopy(MODEL)).eval()
    tensors = torch.load(hub / f"{TASKS[1]}.pt")
    expert.visual.load_state_dict({name.removeprefix("model.visual."): tensor for name, tensor in tensors.items()})
    pixels = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        found = job.family.features(model, {"pixel_values": pixels})
        torch.testing.assert_close(found, expert.encode_image(pixels), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_base_may_be_a_clip_model_of_transformers(hub: Path) -> None:
    """For example openai/clip-vit-base-patch32 for experts of open_clip's `openai` weights; the results are equal."""
    models = steps.open_models(make_job(config(hub)))[0]
    ready, *_ = steps.open_models(make_job(config(hub, f"suite.base={models.base.path}")))
    assert ready.base.path == models.base.path
    assert ready.source.names == models.source.names
    for name in ready.source.names:
        assert torch.equal(ready.source.expert(TASKS[0], name), models.source.expert(TASKS[0], name))


def test_transformers_loads_the_checkpoint_as_clip(hub: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path / "run", hub, "guidance=feature", "eval.samples=8", "pack.open_clip=true")
    verify(checkpoint, False, "cpu", None)
    model = AutoModel.from_pretrained(checkpoint)
    assert isinstance(model, CLIPModel)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    linears = [layer["name"] for layer in metrics["layers"]]
    assert sum(".self_attn.q_proj" in name for name in linears) == 2
    base = CLIPModel.from_pretrained(next((tmp_path / "cache/open_clip").iterdir()))
    tokens = AutoTokenizer.from_pretrained(checkpoint)(["a photo of red"], return_tensors="pt")
    with torch.inference_mode():
        own, other = (each.get_text_features(**tokens).pooler_output for each in (model, base))
        torch.testing.assert_close(own, other)
        pixels = torch.randn(1, 3, 16, 16)
        own, other = (each.get_image_features(pixels).pooler_output for each in (model, base))
        assert not torch.allclose(own, other)
        exported, *_ = open_clip.create_model_and_transforms(f"local-dir:{checkpoint / 'open_clip'}")
        torch.testing.assert_close(exported.eval().encode_image(pixels), own, rtol=0, atol=1e-5)
        ids = open_clip.get_tokenizer(f"local-dir:{checkpoint / 'open_clip'}")(["a photo of red"])
        torch.testing.assert_close(
            exported.encode_text(ids), model.get_text_features(**tokens).pooler_output, rtol=0, atol=1e-5
        )
    assert isinstance(open_clip.get_tokenizer(f"local-dir:{checkpoint / 'open_clip'}"), open_clip.SimpleTokenizer)
