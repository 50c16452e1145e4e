"""open_clip's preprocessing for inference, as an image processor and a tokenizer of transformers.

open_clip itself builds the transform and the tokenizer; this module translates them. Importing open_clip takes
seconds, so it is imported where a model is converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from PIL import Image

START, END = "<|startoftext|>", "<|endoftext|>"
"""transformers' names of open_clip's <start_of_text> and <end_of_text>."""


def image_processor(preprocess: Mapping[str, Any], side: int) -> Any:
    """The CLIPImageProcessor of a preprocess_cfg, for square images of `side` pixels.

    CLIPImageProcessorPil with the same settings gives exactly open_clip's pixels. Those of CLIPImageProcessor differ by
    about one grey level, more if bicubic squashing overshoots, because it resizes tensors instead of Pillow images.
    ValueError if open_clip lacks the transform, or if CLIPImageProcessor lacks one of its steps.
    """
    from transformers import CLIPImageProcessor

    resize, crop, normalize = _steps(preprocess, side)
    whole = {"height": side, "width": side}
    return CLIPImageProcessor(
        size={"shortest_edge": side} if isinstance(resize.size, int) else whole,
        crop_size=whole,
        do_center_crop=crop is not None,
        resample=int(Image.Resampling[resize.interpolation.name]),
        image_mean=list(normalize.mean),
        image_std=list(normalize.std),
    )


def _steps(preprocess: Mapping[str, Any], side: int) -> tuple[Any, Any, Any]:
    """Resize, center crop (or None) and normalization of open_clip's transform."""
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
    from torchvision.transforms import CenterCrop, Normalize, Resize

    settings = merge_preprocess_dict(PreprocessCfg(), {**preprocess, "size": side})
    try:
        transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    except AssertionError as error:  # of a mode, resize_mode or interpolation that open_clip does not have
        raise ValueError(f"preprocess_cfg is {dict(preprocess)}, which open_clip refuses") from error
    steps = {type(step): step for step in transform.transforms}
    if Resize not in steps:
        raise ValueError(f"preprocess_cfg.resize_mode is {settings['resize_mode']!r}")
    return steps[Resize], steps.get(CenterCrop), steps[Normalize]


@lru_cache(maxsize=1)
def tokenizer(context_length: int) -> Any:
    """The CLIPTokenizer with the vocabulary and merges of open_clip's default tokenizer. It is built once: treat it as
    read-only."""
    from open_clip import get_tokenizer
    from transformers import CLIPTokenizer

    merges = list(get_tokenizer().bpe_ranks)
    return CLIPTokenizer(vocab=vocabulary(), merges=merges, model_max_length=context_length)


def vocabulary() -> dict[str, int]:
    """The tokens of open_clip's default tokenizer, as transformers names them, with their numbers."""
    from open_clip import get_tokenizer

    own = get_tokenizer()
    names = {own.sot_token_id: START, own.eot_token_id: END}
    return {names.get(index, word): index for word, index in own.encoder.items()}
