"""Oracle: open_clip's own transform and tokenizer, pixel by pixel and token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from epmq_cli.models.open_clip.preprocess import image_processor, vocabulary

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "squash": {"resize_mode": "squash"},
    "bilinear": {"interpolation": "bilinear"},
    "all": {
        "resize_mode": "squash",
        "interpolation": "bilinear",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
    },
    "one number for all colours": {"mean": 0.5, "std": 0.25},
}
SIZES = [(90, 50), (20, 33), (32, 32), (10, 100)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_the_settings_are_those_of_open_clips_transform(settings: dict[str, Any]) -> None:
    """With Pillow, which open_clip uses to resize, the pixels are equal; transformers' default rounds differently."""
    made, transform = image_processor(settings, 32), open_clip.image_transform(32, is_train=False, **settings)
    kept = {name: value for name, value in made.to_dict().items() if name != "image_processor_type"}
    exact, std = CLIPImageProcessorPil(**kept), torch.tensor(made.image_std)[:, None, None]
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        coarse = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = coarse.resize((8, 8)).resize((width, height), Image.Resampling.BICUBIC)
        expected = transform(image)
        for processor, levels in ((exact, 0.0), (made, 1.0)):
            pixels = processor(images=[image], return_tensors="pt")["pixel_values"][0]
            assert float(((pixels - expected) * std * 255).abs().max()) <= levels + 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize_mode": "longest"}, "resize_mode is 'longest'"),
        ({"resize_mode": "stretch"}, "preprocess_cfg is {'resize_mode': 'stretch'}, which open_clip refuses"),
        ({"interpolation": "nearest"}, "which open_clip refuses"),
    ],
)
def test_a_transform_that_transformers_does_not_have_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_processor(settings, 32)


def test_the_vocabulary_is_open_clips_with_transformers_names_of_start_and_end() -> None:
    own, names = open_clip.SimpleTokenizer(), vocabulary()
    assert len(names) == own.vocab_size == 49408
    assert (names["<|startoftext|>"], names["<|endoftext|>"]) == (own.sot_token_id, own.eot_token_id)
    assert all(names[word] == index for word, index in own.encoder.items() if index < own.sot_token_id)
