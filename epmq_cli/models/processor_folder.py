"""Finds the tokenizer or image processor files of a model folder without transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from epmq_cli.models.processor_files import TEMPLATES, TOKENIZER, matches, own_files

PIXELS = "preprocessor_config.json"
WHOLE = "processor_config.json"  # of a multimodal processor; contains the image processor
PARTS = {"pictures": "image_processor", "sounds": "feature_extractor"}
"""The part of a multimodal processor that reads samples of a kind."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "dict.txt")
"""Tokenizer settings; these files alone are not a tokenizer."""


@dataclass(frozen=True)
class Processor:
    """A tokenizer or image processor from another folder than the model's.

    `rows`: the vocabulary size of the model if it differs from the config, as with `suite.vocabulary=pad`.
    """

    folder: Path
    rows: int | None = None


def processor_files(path: Path, reads: str) -> dict[str, Path]:
    """The files of a folder's own tokenizer or image processor, by name.

    `reads`: "pictures" selects the image processor, "sounds" the feature extractor, any other value the tokenizer. The
    result is empty if the folder has none, such as a state dict or an adapter.
    """
    if not path.is_dir():
        return {}
    files = {name: path / name for name in own_files(path)}
    if (part := PARTS.get(reads)) is not None:
        return {name: file for name, file in files.items() if name == PIXELS or (name == WHOLE and _has(file, part))}
    texts = {name: file for name, file in files.items() if name in SETTINGS or matches(name, (*TOKENIZER, *TEMPLATES))}
    return texts if any(name not in SETTINGS and not matches(name, TEMPLATES) for name in texts) else {}


def same_files(one: dict[str, Path], other: dict[str, Path]) -> bool:
    """Whether two processors have identical files, byte for byte."""
    return one.keys() == other.keys() and all(
        path.read_bytes() == other[name].read_bytes() for name, path in one.items()
    )


def _has(file: Path, part: str) -> bool:
    """Whether a processor_config.json contains an image processor or a feature extractor, as transformers 5 writes
    it."""
    try:
        return part in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
