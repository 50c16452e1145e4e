"""Oracle: the features, tokens and pixels of open_clip."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.models.open_clip.convert import converted
from epmq_cli.models.open_clip.tensors import Translated
from epmq_cli.models.state_dict import open_file
from tests.helpers.tiers import every

MODEL: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "mlp_ratio": 3.0},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = [
    "a photo of a robin.",
    "it's 3 o'clock; two   CARS (red) & a café",
    "",
    "a b c d e f g h i j k l m n o p q r s t u v",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(**options: Any) -> open_clip.CLIP:
    torch.manual_seed(0)
    model = open_clip.CLIP(**copy.deepcopy(MODEL), **options).eval()
    for parameter in model.parameters():  # norms and biases too, so that swapped tensors are detected
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return model


def stored(folder: Path, model: open_clip.CLIP, preprocess: dict[str, Any] | None = None, **options: Any) -> Path:
    """An open_clip folder."""
    folder.mkdir()
    config = {"model_cfg": {**MODEL, **options}, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_converted_model_has_the_features_of_open_clip(quick_gelu: bool, tmp_path: Path) -> None:
    model = build(quick_gelu=quick_gelu)
    folder = converted(stored(tmp_path / "base", model, quick_gelu=quick_gelu), "base")
    clip = CLIPModel.from_pretrained(folder).eval()
    pixels = torch.randn(3, 3, 32, 32)
    tokens = open_clip.SimpleTokenizer(context_length=20)(TEXTS)
    with torch.inference_mode():
        image, text = model.encode_image(pixels), model.encode_text(tokens)
        torch.testing.assert_close(clip.get_image_features(pixel_values=pixels).pooler_output, image, rtol=0, atol=1e-5)
        torch.testing.assert_close(clip.get_text_features(input_ids=tokens).pooler_output, text, rtol=0, atol=1e-5)
    assert torch.equal(clip.logit_scale, model.logit_scale)
    assert image.abs().max() > 0.1


def test_the_two_activations_differ(tmp_path: Path) -> None:
    """Otherwise the test above could not tell them apart."""
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain, quick = (build(quick_gelu=quick).encode_image(pixels) for quick in (False, True))
    assert (plain - quick).abs().max() > 1e-4


def test_tokens_text_features_and_pixels_match_open_clip(tmp_path: Path) -> None:
    model = build()
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    folder = converted(stored(tmp_path / "base", model, given), "base")
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    expected = open_clip.SimpleTokenizer(context_length=20)(TEXTS)
    for own, row in zip(tokens["input_ids"].tolist(), expected.tolist(), strict=True):
        end = row.index(49407) + 1
        assert own[:end] == row[:end]
    with torch.inference_mode():
        features = CLIPModel.from_pretrained(folder).get_text_features(**tokens).pooler_output
        torch.testing.assert_close(features, model.encode_text(expected), rtol=0, atol=1e-5)
    image = Image.effect_noise((90, 50), 60).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(folder)(images=[image], return_tensors="pt")["pixel_values"][0]
    transform = open_clip.image_transform(32, is_train=False, **given)
    torch.testing.assert_close(pixels, transform(image), rtol=0, atol=1.5 / 255 / 0.2)


def wrapped(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "layout",
    every(
        2,
        [
            lambda model: model.state_dict(),
            lambda model: {"state_dict": wrapped("module.", model.state_dict())},
            lambda model: wrapped(
                "model.", {n: t for n, t in model.state_dict().items() if not n.startswith("transf")}
            ),
            lambda model: {
                **wrapped("image_encoder.model.", model.state_dict()),
                "classification_head.weight": torch.ones(3, 24),
            },
            lambda model: model.visual.state_dict(),
        ],
    ),
    ids=["whole", "training checkpoint", "image encoder", "image classifier", "tower"],
)
def test_experts_in_all_layouts_have_the_tensors_of_the_whole_model(
    layout: Callable[[open_clip.CLIP], dict[str, Any]], tmp_path: Path
) -> None:
    base, model = build(), build()
    for parameter in model.visual.parameters():
        parameter.data.add_(0.01)
    torch.save(layout(model), tmp_path / "expert.pt")
    family = FAMILIES["open_clip"]
    opened = family.open(stored(tmp_path / "base", base), "base", None)
    expert = family.open(tmp_path / "expert.pt", "expert", opened)
    whole = family.open(stored(tmp_path / "whole", model), "base", None)
    names = family.tensor_names(opened)
    assert "visual_projection.weight" in names
    assert family.tensor_names(expert) == names
    for name in names.values():
        assert torch.equal(expert.tensor(name), whole.tensor(name))
        assert not torch.equal(expert.tensor(name), opened.tensor(name))
        assert expert.infos[name] == whole.infos[name]


def test_conversions_are_cached_by_content_outside_the_users_folder(tmp_path: Path, cache: Path) -> None:
    model = build()
    source = stored(tmp_path / "base", model)
    before = sorted(source.iterdir())
    folder = converted(source, "base")
    assert folder.parent == cache / "open_clip"
    assert sorted(source.iterdir()) == before
    (folder / ".mark").touch()
    assert (converted(stored(tmp_path / "same", model), "base") / ".mark").exists()
    torch.save(model.state_dict(), source / "open_clip_pytorch_model.bin")
    other = converted(source / "open_clip_pytorch_model.bin", "base")
    assert other != folder
    assert (other / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = build()
    source = stored(tmp_path / "base", model, text_cfg={**MODEL["text_cfg"], "layers": 3})
    with pytest.raises(ModelError, match=r"not those that its open_clip_config.json describes: text_model.encoder"):
        converted(source, "base")
    (source / "open_clip_model.safetensors").rename(source / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no open_clip_model.safetensors; name the file itself: .*\.bin"):
        converted(source, "base")
    for tensors, message in (
        ({"fc.weight": torch.ones(2, 2)}, "has no visual.conv1.weight"),
        (
            {"visual.conv1.weight": torch.ones(8, 3, 2, 2), "visual.bn1.weight": torch.ones(8)},
            "holds visual.bn1.weight",
        ),
    ):
        torch.save(tensors, tmp_path / "expert.pt")
        with pytest.raises(ModelError, match=f"expert: .*{message}"):
            Translated(open_file(tmp_path / "expert.pt", "expert"), tmp_path / "expert.pt", "expert")


@pytest.mark.parametrize("rows", [None, 95, 97])
def test_a_fused_projection_of_another_size_is_refused(rows: int | None, tmp_path: Path) -> None:
    tensors = build().visual.state_dict()
    name = "transformer.resblocks.0.attn.in_proj_weight"
    tensors[name] = torch.tensor(1.0) if rows is None else torch.ones(rows, 32)
    torch.save(tensors, tmp_path / "expert.pt")
    with pytest.raises(ModelError, match=f"expert: .*expert.pt holds {name} of the shape .* rows are not those of 3"):
        Translated(open_file(tmp_path / "expert.pt", "expert"), tmp_path / "expert.pt", "expert")


def test_more_layers_than_stored_are_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "base", build()) / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 1 << 40
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="open_clip_config.json asks for layers=1099511627776, which a model of"):
        converted(path.parent, "base")
