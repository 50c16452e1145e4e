"""Oracle: the features, tokens and pixels of CLIPModel in transformers, which the exported model must reproduce in
open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from epmq_cli.checkpoint.open_clip import FOLDER, check_base, stored_entries, write_open_clip
from epmq_cli.commands.verify import verify
from epmq_cli.errors import CheckpointError, ConfigError, ModelError
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open_clip.config import clip_config
from epmq_cli.models.open_clip.convert import WEIGHTS
from epmq_cli.models.open_clip.export import NotExpressibleError, model_cfg, named_model, preprocess_cfg
from epmq_cli.pipeline.job import make_job
from tests.commands.test_merge import merged
from tests.helpers.hubs import config

VISION = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2}
END = {"vocab_size": 300, "bos_token_id": 298, "eos_token_id": 299, "pad_token_id": 299}
TOKENS = torch.tensor([[298, 5, 40, 7, 299, 0], [298, 40, 299, 0, 0, 0]])


def clip(**options: Any) -> CLIPConfig:
    """A small config; options have the form part__option."""
    parts: dict[str, dict[str, Any]] = {
        "vision_config": {**VISION, "image_size": 32, "patch_size": 16},
        "text_config": {**TEXT, **END, "max_position_embeddings": 6},
    }
    for key, value in options.items():
        part, name = key.split("__")
        parts[part][name] = value
    return CLIPConfig(projection_dim=20, **parts)


def saved(folder: Path, config: CLIPConfig, **pixels: Any) -> CLIPModel:
    """Writes a folder with a random model and its image processor."""
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # norms and biases too, so that swapped tensors are detected
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessor(**{"size": {"shortest_edge": 32}, "crop_size": side, **pixels}).save_pretrained(folder)
    return model


def exported(folder: Path) -> Any:
    """The model, its transform and its tokenizer, as open_clip loads them."""
    check_base(ModelFolder(folder, "base"))
    write_open_clip(stored_entries, folder)
    name = f"local-dir:{folder / FOLDER}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    return model.eval(), transform, open_clip.get_tokenizer(name)


@pytest.mark.parametrize(
    "config",
    [
        clip(vision_config__hidden_act="gelu", text_config__hidden_act="gelu"),
        clip(vision_config__layer_norm_eps=1e-3, text_config__layer_norm_eps=1e-4),
        clip(text_config__eos_token_id=2),
        clip(text_config__eos_token_id=40),
    ],
    ids=["gelu", "epsilons of the norms", "end of old configs", "end that is not the largest token"],
)
def test_the_exported_model_gives_the_features_of_clip_model(config: CLIPConfig, tmp_path: Path) -> None:
    model = saved(tmp_path, config)
    own, *_ = exported(tmp_path)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        image, text = model.get_image_features(pixels).pooler_output, model.get_text_features(TOKENS).pooler_output
        torch.testing.assert_close(own.encode_image(pixels), image, rtol=0, atol=1e-5)
        torch.testing.assert_close(own.encode_text(TOKENS), text, rtol=0, atol=1e-5)
    assert torch.equal(own.logit_scale, model.logit_scale)
    assert image.abs().max() > 0.1


@pytest.mark.parametrize(
    "pixels",
    [
        {},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    ],
    ids=["CLIP's own", "squashed", "other colours"],
)
def test_open_clip_produces_the_pixels_of_the_checkpoint(pixels: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, clip(), **pixels)
    _, transform, _ = exported(tmp_path)
    image = Image.effect_noise((90, 50), 60).convert("RGB")
    made = AutoImageProcessor.from_pretrained(tmp_path)(images=[image], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform(image), made, rtol=0, atol=1.01 / 255 / 0.2)


def test_another_tokenizer_is_exported_with_the_model(clip_hub: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(clip_hub / "base", tmp_path / "base")
    own, _, tokenizer = exported(tmp_path / "base")
    texts = ["a photo of red", "green film"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "base")(texts, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(tmp_path / "base").eval()
    with torch.inference_mode():
        text = model.get_text_features(**tokens).pooler_output
        torch.testing.assert_close(own.encode_text(tokenizer(texts)), text, rtol=0, atol=1e-5)


def test_a_model_from_the_list_of_open_clip_loads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "base", clip())
    exported(tmp_path / "base")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", model_cfg(model.config))
    assert named_model(model_cfg(model.config)) == "tiny-quickgelu"
    file = str(tmp_path / "base" / FOLDER / WEIGHTS)
    own, *_ = open_clip.create_model_and_transforms("tiny-quickgelu", pretrained=file)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        image = model.get_image_features(pixels).pooler_output
        torch.testing.assert_close(own.eval().encode_image(pixels), image, rtol=0, atol=1e-5)


def test_a_merge_of_clip_models_is_written_for_open_clip_too(
    clip_hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = merged(clip_hub, tmp_path / "run", "merge=average", "pack.open_clip=true")
    verify(checkpoint, False, "cpu", None)
    model = CLIPModel.from_pretrained(checkpoint).eval()
    own, *_ = open_clip.create_model_and_transforms(f"local-dir:{checkpoint / FOLDER}")
    pixels = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        image = model.get_image_features(pixels).pooler_output
        torch.testing.assert_close(own.eval().encode_image(pixels), image, rtol=0, atol=1e-5)
    (checkpoint / FOLDER / WEIGHTS).write_bytes(b"other")
    with pytest.raises(CheckpointError):
        verify(checkpoint, False, "cpu", None)
    assert f"{FOLDER}/{WEIGHTS} has 5 bytes" in capsys.readouterr().out


def test_other_families_are_refused_before_any_model_is_opened(bert_hub: Path) -> None:
    with pytest.raises(ConfigError, match="pack.open_clip=true needs suite.family clip or open_clip, got bert"):
        make_job(config(bert_hub, "pack.open_clip=true", "suite.base=nowhere"))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14"])
def test_configs_of_open_clip_are_reproduced(name: str) -> None:
    config = {"model_cfg": open_clip.get_model_config(name)}
    assert named_model(model_cfg(clip_config(config, name, "base"))) == name


def test_weights_are_stored_once_in_their_type(tmp_path: Path) -> None:
    saved(tmp_path, clip()).half().save_pretrained(tmp_path)
    exported(tmp_path)
    tensors = load_file(tmp_path / FOLDER / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert tensors["visual.transformer.resblocks.0.attn.in_proj_weight"].shape == (96, 32)
    assert tensors.keys() == open_clip.CLIP(**model_cfg(clip())).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"vision_config__hidden_act": "gelu"}, "hidden_act is gelu and quick_gelu"),
        ({"vision_config__hidden_act": "silu", "text_config__hidden_act": "silu"}, "hidden_act is silu"),
        ({"vision_config__num_channels": 1}, "vision_config.num_channels is 1"),
    ],
)
def test_a_model_that_open_clip_does_not_have_is_refused(options: dict[str, Any], phrase: str, tmp_path: Path) -> None:
    CLIPModel(clip(**options)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"base: {phrase} in .*, which open_clip does not support; set pack.open_clip"):
        check_base(ModelFolder(tmp_path, "base"))


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"size": {"shortest_edge": 36}}, "size of the image processor is .*36"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor of the image processor is 0.0078"),
        ({"do_normalize": False}, "do_normalize of the image processor is False"),
        ({"resample": 0}, "resample of the image processor is 0"),
    ],
)
def test_pixels_that_open_clip_cannot_produce_are_refused(options: dict[str, Any], phrase: str) -> None:
    side = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(**{"size": {"shortest_edge": 32}, "crop_size": side, **options})
    with pytest.raises(NotExpressibleError, match=phrase):
        preprocess_cfg(processor, 32)
