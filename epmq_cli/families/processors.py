"""What a folder's own tokenizer and image processor make of samples; what they cannot make, or the model
cannot read, ends in one sentence that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from epmq_cli.checkpoint.pretrained import config_of, from_folder
from epmq_cli.errors import ModelError, first_line, lacks_memory
from epmq_cli.families.family import Batch, Collate
from epmq_cli.linalg import is_finite

PIXELS = "preprocessor_config.json"


def own_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer; ModelError where it knows no words: without a vocabulary transformers makes an empty one,
    to which every word is unknown."""
    from transformers import AutoTokenizer

    tokenizer = from_folder(AutoTokenizer, folder)
    special = set(tokenizer.all_special_tokens)
    if not any(token not in special and token.strip("\u2581 ") for token in tokenizer.get_vocab()):
        raise ModelError(
            f"{folder} has no vocabulary, such as a tokenizer.json or a vocab.txt, that {type(tokenizer).__name__} "
            "could read; put the tokenizer's files there"
        )
    return tokenizer


def tokens(folder: Path, longest: int | None = None) -> Callable[..., Any]:
    """A folder's tokenizer as a function of texts, which gives tensors; ModelError where it cannot, or where the model
    has no row for one of its ids. `longest`: as many tokens as it cuts texts to, where itself it would keep more."""
    tokenizer = own_tokenizer(folder)
    rows = config_of(folder).get_text_config().vocab_size
    most = tokenizer.model_max_length
    if not isinstance(most, int | float) or most < 1:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'} has a model_max_length of {most!r}, which must be a number of tokens; "
            "fetch it again"
        )
    if longest is not None and longest < most:
        tokenizer.model_max_length = longest

    def encoded(texts: Any, **options: Any) -> Any:
        try:
            found = tokenizer(texts, return_tensors="pt", **options)
        except Exception as error:
            if lacks_memory(error):
                raise
            raise ModelError(
                f"the tokenizer in {folder} fails on a text ({first_line(error)}); fetch its files again"
            ) from error
        ids = found["input_ids"]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise ModelError(
                f"the tokenizer in {folder} gives a text the token {int(ids.max())}, and the model beside it has "
                f"{rows} of them; fetch both again"
            )
        return found

    return encoded


def images(folder: Path) -> Collate:
    """Images through the folder's own image processor, as RGB; ModelError where it cannot, or where what it makes is
    not what the model beside it reads."""
    from transformers import AutoImageProcessor

    processor = from_folder(AutoImageProcessor, folder)
    config = config_of(folder)
    config = getattr(config, "vision_config", config)
    side = config.image_size
    wanted = (config.num_channels, *(side if isinstance(side, list | tuple) else (side, side)))

    def collate(pictures: list[Any]) -> Batch:
        try:
            found = processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
            pixels = torch.as_tensor(found["pixel_values"])
        except Exception as error:
            if lacks_memory(error):
                raise
            raise ModelError(f"{folder / PIXELS} fails on a picture ({first_line(error)}); fetch it again") from error
        if pixels.shape[1:] != wanted:
            raise ModelError(
                f"{folder / PIXELS} makes pictures of {list(pixels.shape[1:])}, and the model beside it reads "
                f"{list(wanted)}; set its size and crop_size to that"
            )
        if not is_finite(pixels):
            raise ModelError(f"{folder / PIXELS} makes pixels that are a NaN or an infinity; check mean and std in it")
        return {"pixel_values": pixels}

    return collate
