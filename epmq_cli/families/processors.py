"""What a tokenizer or an image processor makes of samples; what it cannot make, or the model cannot read, ends in one
sentence that names the file."""

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
"""Of a text for each of its tokens, and for as many more: no tokenizer keeps a text in fewer."""


def own(kind: Any, folder: Path, processor: Processor | None) -> Any:
    """What an Auto class of transformers makes of a processor's files; where there is no config.json beside them, as in
    an adapter's folder, the config of the model in `folder` says which class to take."""
    where = processor.folder if processor else folder
    options = {} if (where / "config.json").is_file() else {"config": config_of(folder)}
    return from_folder(kind, where, **options)


def own_tokenizer(folder: Path, processor: Processor | None = None) -> Any:
    """A folder's tokenizer; ModelError where it knows no words."""
    from transformers import AutoTokenizer

    tokenizer = own(AutoTokenizer, folder, processor)
    if not has_words(tokenizer):
        raise ModelError(
            f"{processor.folder if processor else folder} has no vocabulary, such as a tokenizer.json or a vocab.txt, "
            f"that {type(tokenizer).__name__} could read; put the tokenizer's files there"
        )
    return tokenizer


def tokens(folder: Path, longest: int | None = None, processor: Processor | None = None) -> Callable[..., Any]:
    """A tokenizer as a function of texts, which gives tensors; ModelError where it cannot, or where the model in
    `folder` has no row for one of its ids. `longest`: as many tokens as it cuts texts to, where itself it would keep
    more. `processor`: where it is, if not in `folder`."""
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
    if tokenizer.pad_token is None:  # masked wherever it is, so that any token does
        tokenizer.pad_token = _filler(tokenizer)

    def encoded(texts: Any, **options: Any) -> Any:
        try:
            found = tokenizer(texts, return_tensors="pt", **options)
        except Exception as error:
            if lacks_memory(error):
                raise
            raise ModelError(
                f"the tokenizer in {where} fails on a text ({first_line(error)}); fetch its files again"
            ) from error
        ids = found["input_ids"]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise ModelError(
                f"the tokenizer in {where} gives a text the token {int(ids.max())}, and the model {_has(processor)} "
                f"{rows} of them; fetch both again"
            )
        return found

    return encoded


def check_kept(folder: Path, texts: Iterable[str], count: int) -> None:
    """ModelError where a tokenizer makes so few tokens of texts that it must have dropped most of them, as one does
    that transformers reads with another class than it was made for."""
    letters = sum(len("".join(text.split())) for text in texts)
    if letters > LETTERS * (count + LETTERS):
        raise ModelError(
            f"the tokenizer in {folder} reads {letters} characters of text as {count} "
            f"{'token' if count == 1 else 'tokens'}, so most of the text is lost; check that tokenizer_class in its "
            "tokenizer_config.json is the class that its files are made for"
        )


def _filler(tokenizer: Any) -> str:
    """A token to pad with for a tokenizer that has none for that."""
    kinds = (tokenizer.eos_token, tokenizer.sep_token, tokenizer.unk_token, tokenizer.bos_token)
    found: str = next((token for token in kinds if token), None) or tokenizer.convert_ids_to_tokens(0)
    return found


def _has(processor: Processor | None) -> str:
    return "has" if processor else "beside it has"


def image_file(folder: Path) -> Path:
    """The file that describes a folder's image processor."""
    return folder / (PIXELS if (folder / PIXELS).is_file() or not (folder / WHOLE).is_file() else WHOLE)


def own_images(folder: Path, processor: Processor | None = None) -> Any:
    """A folder's image processor."""
    from transformers import AutoImageProcessor

    return own(AutoImageProcessor, folder, processor)


def images(folder: Path, processor: Processor | None = None) -> Collate:
    """Images through an image processor, as RGB; ModelError where it cannot, or where what it makes is not what the
    model in `folder` reads. `processor`: where it is, if not in `folder`."""
    made = own_images(folder, processor)
    file = image_file(processor.folder if processor else folder)
    config = config_of(folder)
    config = getattr(config, "vision_config", config)
    side = config.image_size
    wanted = (config.num_channels, *(side if isinstance(side, list | tuple) else (side, side)))

    def collate(pictures: list[Any]) -> Batch:
        try:
            found = made(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
            pixels = torch.as_tensor(found["pixel_values"])
        except Exception as error:
            if lacks_memory(error):
                raise
            raise ModelError(f"{file} fails on a picture ({first_line(error)}); fetch it again") from error
        if pixels.shape[1:] != wanted:
            raise ModelError(
                f"{file} makes pictures of {list(pixels.shape[1:])}, and the model{' beside it' * (processor is None)} "
                f"reads {list(wanted)}; set its size and crop_size to that"
            )
        if not is_finite(pixels):
            raise ModelError(f"{file} makes pixels that are a NaN or an infinity; check mean and std in it")
        return {"pixel_values": pixels}

    return collate
