"""Oracle: the features of open_clip under its own model names, in a mirror and in a hub cache that the tests create."""

from __future__ import annotations

import copy
import json
import os
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, CLIPModel

from epmq_cli.data.suite import Suite
from epmq_cli.data.tiny.tasks import Tiny
from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES, suite_family
from epmq_cli.models.resolve import locate
from tests.models.open_clip.test_tensors import MODEL, build, stored

TAGS = {
    "web": {"hf_hub": "owner/tiny-web/", "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "resize_mode": "squash"},
    "pickled": {"hf_hub": "owner/tiny-pickled/weights.bin"},
}


@pytest.fixture(autouse=True)
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds a small model with two tags to those of open_clip; uses temporary caches and no network."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-B-32", copy.deepcopy(MODEL))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-B-32", TAGS)
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def ask(*_: Any, **__: Any) -> Any:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(socket.socket, "connect", ask)


def cached(folder: Path, repository: str) -> Path:
    """The folder of a repository in the hub's cache."""
    place = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return place / "snapshots" / ("0" * 40)


def image_features(model: Any) -> torch.Tensor:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = model.encode_image(pixels) if hasattr(model, "encode_image") else model.get_image_features(pixels)
    features: torch.Tensor = getattr(found, "pooler_output", found)
    return features


def test_a_tag_in_a_mirror_has_the_features_and_preprocessing_of_open_clip(tmp_path: Path) -> None:
    """The weights determine the activation, which create_model of open_clip takes as an option."""
    model = build(quick_gelu=True)
    (tmp_path / "mirror/owner/tiny-web").mkdir(parents=True)
    save_file(model.state_dict(), tmp_path / "mirror/owner/tiny-web/open_clip_model.safetensors")
    for source in ("open_clip:tiny-B-32/web", "open_clip:tiny-B/32/Web"):
        folder = locate(source, "base", str(tmp_path / "mirror"))
    opened = FAMILIES["open_clip"].open(folder, "base", None)
    assert opened.path == folder
    file = str(tmp_path / "mirror/owner/tiny-web/open_clip_model.safetensors")
    own, *_ = open_clip.create_model_and_transforms("tiny-B-32", pretrained=file, force_quick_gelu=True)
    clip = CLIPModel.from_pretrained(folder).eval()
    torch.testing.assert_close(image_features(clip), image_features(own.eval()), rtol=0, atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert (processor.image_mean, processor.do_center_crop) == ((0.5, 0.5, 0.5), False)


def test_offline_tags_come_from_the_hubs_cache_with_safetensors_first(tmp_path: Path) -> None:
    model = build(quick_gelu=True)
    place = cached(tmp_path, "owner/tiny-web")
    torch.save({"logit_scale": torch.ones(3)}, place / "open_clip_pytorch_model.bin")
    save_file(model.state_dict(), place / "open_clip_model.safetensors")
    clip = CLIPModel.from_pretrained(locate("open_clip:tiny-B-32/web", "base")).eval()
    torch.testing.assert_close(image_features(clip), image_features(model), rtol=0, atol=1e-5)


class Code:
    """Runs code when it is unpickled without weights_only."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 3",)


def test_a_pickle_behind_a_tag_is_read_as_tensors_only(tmp_path: Path) -> None:
    model = build()
    place = cached(tmp_path, "owner/tiny-pickled")
    torch.save({"state_dict": model.state_dict()}, place / "weights.bin")
    clip = CLIPModel.from_pretrained(locate("open_clip:tiny-B-32/pickled", "base")).eval()
    torch.testing.assert_close(image_features(clip), image_features(model), rtol=0, atol=1e-5)
    torch.save({"state_dict": model.state_dict(), "code": Code()}, place / "weights.bin")
    with pytest.raises(ModelError, match="weights.bin is not a plain state dict: it contains pickled objects"):
        locate("open_clip:tiny-B-32/pickled", "base")


@pytest.mark.parametrize("root", [None, "mirror"])
def test_the_error_for_a_missing_tag_names_the_download_command(root: str | None) -> None:
    place = f"in {root}/owner/tiny-web" if root else "in a mirror \\(data_root\\)"
    wanted = f"base: open_clip_model.safetensors of owner/tiny-web is neither {place} nor in the cache of the hub"
    remedy = r"run: hf download owner/tiny-web open_clip_model.safetensors \(or open_clip_pytorch_model.bin\)$"
    with pytest.raises(ModelError, match=f"{wanted}, and .*{remedy}") as found:
        locate("open_clip:tiny-B-32/web", "base", root)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("open_clip:ViT-B32/openai", "open_clip has no model 'ViT-B32', got .*; close names are .*ViT-B-32"),
        ("open_clip:xyz/openai", r"no model 'xyz', got .*; it has ViT-B-16, .*\.\.\. \(open_clip.list_pretrained"),
        ("open_clip:tiny-B-32/wep", "no pretrained weights 'wep' of tiny-B-32, got .*TAG; close names are web$"),
        (
            "open_clip:tiny-B-32",
            "only by a tag for tiny-B-32, got .*; give open_clip:tiny-B-32/TAG; it has web, pickled",
        ),
        ("open_clip:ViT-B-32/open_ai", "no pretrained weights 'open_ai' of ViT-B-32, .*close names are openai"),
        (
            "open_clip:RN50/openai",
            r"layers is \[3, 4, 6, 3\] \(a ResNet\) in open_clip's config of RN50; family open_clip",
        ),
        ("open_clip:ViT-B-16-SigLIP/webli", "in open_clip's config of ViT-B-16-SigLIP; family open_clip needs"),
        ("open_clip:hf-hub:tiny", "open_clip:hf-hub:tiny must be open_clip:hf-hub:owner/name"),
        ("open_clip:hf-hub:../tiny", "must be open_clip:hf-hub:owner/name"),
        (
            "open_clip:./nowhere",
            "open_clip:./nowhere must be a folder with open_clip_config.json, and nowhere has none",
        ),
    ],
)
def test_unknown_names_are_refused_with_similar_ones(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"base: .*{message}"):
        locate(source, "base")


def test_a_repository_and_a_folder_are_opened_like_an_open_clip_folder(tmp_path: Path) -> None:
    model = build()
    place = cached(tmp_path, "owner/own")
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    with pytest.raises(ModelError, match="open_clip_model.safetensors of owner/own is neither"):
        torch.save(model.state_dict(), place / "open_clip_pytorch_model.bin")  # the suite does not name this pickle
        locate("open_clip:hf-hub:owner/own", "base")
    save_file(model.state_dict(), place / "open_clip_model.safetensors")
    folder = stored(tmp_path / "folder", model)
    for source in ("open_clip:hf-hub:owner/own", f"open_clip:{folder}", f"open_clip:local-dir:{folder}"):
        opened = FAMILIES["open_clip"].open(locate(source, "base"), "base", None)
        clip = CLIPModel.from_pretrained(opened.path).eval()
        torch.testing.assert_close(image_features(clip), image_features(model), rtol=0, atol=1e-5)


def test_the_family_of_a_tag_is_open_clip() -> None:
    task = {"expert": "a.pt", "data": Tiny("digits", 8, 8)}
    suite = Suite(name="x", family="auto", base="open_clip:tiny-B-32/web", tasks={"digits": task})
    assert suite_family(suite) is FAMILIES["open_clip"]
