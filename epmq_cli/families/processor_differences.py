"""Compares two tokenizers, image processors or feature extractors by their outputs for the same samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.chats import Chat
from epmq_cli.data.suite import Task
from epmq_cli.errors import DataError, ModelError
from epmq_cli.families.family import Family
from epmq_cli.families.processors import image_file, own_images, tokens
from epmq_cli.families.rendering import chat_ids
from epmq_cli.families.sound_features import own_extractor
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.models.processor_folder import Processor

TOLERANCE = 0.005
"""The mean difference of values, in standard deviations, up to which two processors count as equal. Pillow and
torchvision differ by 0.0001, bicubic and bilinear resampling by 0.02."""
CHUNK = 16  # samples at a time
LONGEST = 4000  # characters of a document
SHOWN_IDS, SHOWN_TEXT, SHOWN_SETTINGS = 12, 60, 4
FIRST = ("image_mean", "image_std", "size", "crop_size", "resample", "do_rescale", "rescale_factor", "do_normalize")
ASIDE = (
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "_processor_class",
    "_valid_processor_keys",
)
"""Settings of image processors that are named first, and those that do not affect the output."""
VALUES = {"pictures": "pixel_values", "sounds": "input_features"}
SETTINGS_OF = {"pictures": own_images, "sounds": own_extractor}
"""The values of a batch, and the function that loads the processor, by what a family reads."""


def difference(
    family: Family, base: Path, task: Task, expert: Processor, samples: Sequence[Any], own: Processor | None = None
) -> str | None:
    """The difference between the outputs of an expert's and the base's processor for a task's samples, as a phrase
    after "its tokenizer" or "its image processor"; None if they are equal. `base` has the base's config, and its
    processor unless `own` gives another place. ModelError if the expert's processor fails."""
    theirs, bases = _read(family, base, task, expert), None
    for start in range(0, len(samples), CHUNK):
        chunk = [samples[i] for i in range(start, min(start + CHUNK, len(samples)))]
        batch = theirs(chunk)
        try:
            bases = bases or _read(family, base, task, own)
            base_batch = bases(chunk)
        except (ModelError, DataError) as error:
            return f"reads the task's samples, which the base's does not ({error})"
        if not _same(family, batch, base_batch):
            if family.reads in SETTINGS_OF:
                return _settings(SETTINGS_OF[family.reads], base, expert, own)
            return _first_text(theirs, bases, chunk)
    return None


def _read(family: Family, folder: Path, task: Task, processor: Processor | None) -> Collate:
    """The function from samples to batches that the family uses."""
    if not isinstance(family.tasks, LanguageModel):
        return family.collate(folder, task, processor)
    encode = tokens(folder, processor=processor)

    def read(documents: list[Any]) -> Batch:
        if isinstance(documents[0], Chat):
            return {str(i): ids for i, ids in enumerate(chat_ids(folder, documents, processor))}
        texts = [document[:LONGEST] for document in documents]
        return {str(i): encode(text, verbose=False)["input_ids"] for i, text in enumerate(texts)}

    return read


def _same(family: Family, one: Batch, other: Batch) -> bool:
    if (name := VALUES.get(family.reads)) is not None:
        return values_agree(one[name], other[name])
    one, other = _filled(one), _filled(other)
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _filled(batch: Batch) -> Batch:
    """The batch with token types, which are 0 by default."""
    ids = batch.get("input_ids")
    return batch if ids is None else {"token_type_ids": torch.zeros_like(ids), **batch}


def values_agree(one: Tensor, other: Tensor) -> bool:
    """Whether two batches of pixels, or of features of sounds, are equal up to the rounding of resampling."""
    if one.shape != other.shape:
        return False
    return float((one - other).abs().mean()) <= TOLERANCE * float(other.std())


def _first_text(theirs: Collate, bases: Collate, chunk: Sequence[Any]) -> str:
    """The first text that the two tokenize differently, and both results."""
    for sample in chunk:
        one, other = theirs([sample]), bases([sample])
        for name in [*one, *(name for name in other if name not in one)]:
            mine, others = one.get(name), other.get(name)
            if mine is None or others is None or not torch.equal(mine, others):
                what = "" if name in ("input_ids", "0") else f" ({name})"
                return f"reads {_text(sample)} as {_ids(mine)}{what}, and the base's as {_ids(others)}"
    one, other = theirs(list(chunk)), bases(list(chunk))
    for name, tensor in one.items():
        rows = zip(tensor, other.get(name, tensor), chunk, strict=False)
        for row, base_row, sample in rows:
            if not torch.equal(row, base_row):
                return f"pads {_text(sample)} to {_ids(row[None])}, and the base's to {_ids(base_row[None])}"
    return "pads texts to another length than the base's"


def _text(sample: Any) -> str:
    if isinstance(sample, Chat):
        return sample.where
    text = sample if isinstance(sample, str) else " | ".join(sample)
    return repr(text if len(text) <= SHOWN_TEXT else text[:SHOWN_TEXT] + "...")


def _ids(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    ids = tensor.flatten().tolist()
    return f"[{', '.join(map(str, ids[:SHOWN_IDS]))}{', ...' if len(ids) > SHOWN_IDS else ''}]"


def _settings(load: Callable[..., Any], base: Path, expert: Processor, own: Processor | None) -> str:
    """The settings in which two image processors or feature extractors differ, with both values."""
    one, other = (_plain(load(base, processor).to_dict()) for processor in (expert, own))
    file = image_file(expert.folder).name
    names = [name for name in dict.fromkeys([*FIRST, *sorted({*one, *other})]) if name not in ASIDE]
    differences = [name for name in names if one.get(name) != other.get(name)]
    phrases = [
        f"{name} {one.get(name)} where the base's has {other.get(name)}" for name in differences[:SHOWN_SETTINGS]
    ]
    if not phrases:
        kinds = [type(load(base, processor)).__name__ for processor in (expert, own)]
        return f"is a {kinds[0]}, and the base's a {kinds[1]}, which return other values for the task's samples"
    more = f" and {len(differences) - SHOWN_SETTINGS} more" if len(differences) > SHOWN_SETTINGS else ""
    return f"({file}) has {', '.join(phrases)}{more}"


def _plain(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as JSON, so that a tuple equals a list and an enumeration its number."""
    return {name: json.dumps(value, default=str) for name, value in settings.items() if value is not None}
