"""Tokenizers and image processors as functions of samples. ModelError names the file if a processor
fails on a sample, or if the model cannot read its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.errors import ModelError, first_line, lacks_memory
from epmq_cli.models.pretrained import config_of, from_folder
from epmq_cli.models.processor_files import has_words
from epmq_cli.models.processor_folder import PIXELS, WHOLE, Processor
from epmq_cli.quantize.linalg import is_finite

LETTERS = 30
"""The maximum letters per token, and the tokens of slack, of a tokenizer that keeps the whole text."""


def own(kind: Any, folder: Path, processor: Processor | None) -> Any:
    """The processor that an Auto class of transformers loads. Without a config.json beside its files, as in the folder
    of a LoRA adapter, the config of the model in `folder` selects the class."""
    where = processor.folder if processor else folder
    options = {} if (where / "config.json").is_file() else {"config": config_of(folder)}
    return from_folder(kind, where, **options)


def own_tokenizer(folder: Path, processor: Processor | None = None) -> Any:
    """The tokenizer of a folder; ModelError if it has no vocabulary."""
    from transformers import AutoTokenizer

    tokenizer = own(AutoTokenizer, folder, processor)
    if not has_words(tokenizer):
        raise ModelError(
            f"{processor.folder if processor else folder} has no vocabulary, such as a tokenizer.json or a vocab.txt, "
            f"that {type(tokenizer).__name__} could read; put the tokenizer's files there"
        )
    return tokenizer


def tokens(folder: Path, longest: int | None = None, processor: Processor | None = None) -> Callable[..., Any]:
    """A tokenizer as a function from texts to tensors; ModelError if it fails, or if the model in `folder` has no row
    for one of its ids. `longest`: the length that it cuts texts to, if its own is larger. `processor`: its place,
    if not `folder`."""
    tokenizer = own_tokenizer(folder, processor)
    where, rows = folder, config_of(folder).get_text_config().vocab_size
    if processor:
        where, rows = processor.folder, processor.rows or rows
    most = tokenizer.model_max_length
    if not isinstance(most, int | float) or most < 1:
        raise ModelError(
            f"{where / 'tokenizer_config.json'} has a model_max_length of {most!r}, which must be a number of tokens; "
            "fetch it again"
        )
    if longest is not None and longest < most:
        tokenizer.model_max_length = longest
    tokenizer.padding_side = "right"  # heads read the first token, and positions count from it
    if tokenizer.pad_token is None:  # padding is masked, so any token serves
        tokenizer.pad_token = _filler(tokenizer)

    def encode(texts: Any, **options: Any) -> Any:
        try:
            encoding = tokenizer(texts, return_tensors="pt", **options)
        except Exception as error:
            if lacks_memory(error):
                raise
            raise ModelError(
                f"the tokenizer in {where} fails on a text ({first_line(error)}); fetch its files again"
            ) from error
        ids = encoding["input_ids"]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise ModelError(
                f"the tokenizer in {where} returns the token id {int(ids.max())}, and the model {_has(processor)} "
                f"{rows} tokens; fetch both again"
            )
        return encoding

    return encode


def check_not_truncated(folder: Path, texts: Iterable[str], count: int) -> None:
    """Raises ModelError if a tokenizer returns so few tokens that it must have dropped most of the text, which
    happens when transformers loads it with the wrong class."""
    letters = sum(len("".join(text.split())) for text in texts)
    if letters > LETTERS * (count + LETTERS):
        raise ModelError(
            f"the tokenizer in {folder} reads {letters} characters of text as {count} "
            f"{'token' if count == 1 else 'tokens'}, so most of the text is lost; check that tokenizer_class in its "
            "tokenizer_config.json is the class that its files are made for"
        )


def _filler(tokenizer: Any) -> str:
    """A padding token for a tokenizer that defines none."""
    kinds = (tokenizer.eos_token, tokenizer.sep_token, tokenizer.unk_token, tokenizer.bos_token)
    token: str = next((kind for kind in kinds if kind), None) or tokenizer.convert_ids_to_tokens(0)
    return token


def _has(processor: Processor | None) -> str:
    return "has" if processor else "beside it has"


def image_file(folder: Path) -> Path:
    """The file that describes a folder's image processor."""
    return folder / (PIXELS if (folder / PIXELS).is_file() or not (folder / WHOLE).is_file() else WHOLE)


def own_images(folder: Path, processor: Processor | None = None) -> Any:
    """The image processor of a folder."""
    from transformers import AutoImageProcessor

    return own(AutoImageProcessor, folder, processor)


def images(folder: Path, processor: Processor | None = None) -> Collate:
    """An image processor as a function from images, converted to RGB, to batches; ModelError if it fails, or if the
    model in `folder` reads other shapes. `processor`: its place, if not `folder`."""
    process = own_images(folder, processor)
    file = image_file(processor.folder if processor else folder)
    config = config_of(folder)
    config = getattr(config, "vision_config", config)
    side = config.image_size
    shape = (config.num_channels, *(side if isinstance(side, list | tuple) else (side, side)))

    def collate(pictures: list[Any]) -> Batch:
        try:
            output = process(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
            pixels = torch.as_tensor(output["pixel_values"])
        except Exception as error:
            if lacks_memory(error):
                raise
            raise ModelError(f"{file} fails on an image ({first_line(error)}); fetch it again") from error
        if pixels.shape[1:] != shape:
            raise ModelError(
                f"{file} makes images of {list(pixels.shape[1:])}, and the model{' beside it' * (processor is None)} "
                f"reads {list(shape)}; set its size and crop_size to that"
            )
        if not is_finite(pixels):
            raise ModelError(f"{file} makes pixels that are NaN or infinite; check mean and std in it")
        return {"pixel_values": pixels}

    return collate
