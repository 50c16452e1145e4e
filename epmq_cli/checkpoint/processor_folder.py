"""The files of a model folder that its tokenizer or image processor is made of; transformers is not asked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

PIXELS = "preprocessor_config.json"
WHOLE = "processor_config.json"  # of a processor for pictures and texts, with the image processor inside
VOCABULARY = (
    "tokenizer.json",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "*.spm",
)
"""Files with tokens; without one of them there is no tokenizer."""
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "dict.txt", "*.codes")
"""What else says how a tokenizer works."""


@dataclass(frozen=True)
class Processor:
    """The folder of a tokenizer or an image processor that is not the one beside the model. `rows`: how many tokens the
    model has, where that is not what the config beside it says, as with `suite.vocabulary=pad`."""

    folder: Path
    rows: int | None = None


def processor_files(path: Path, reads: str) -> dict[str, Path]:
    """By name the files of a folder's own tokenizer, where samples are texts, or of its own image processor; none where
    it has none, as a state dict or an adapter may be."""
    if not path.is_dir():
        return {}
    files = {file.name: file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")}
    if reads == "pictures":
        return {name: file for name, file in files.items() if name == PIXELS or (name == WHOLE and _sees(file))}
    found = {name: file for name, file in files.items() if _matches(name, (*VOCABULARY, *BESIDE))}
    return found if any(_matches(name, VOCABULARY) for name in found) else {}


def same_files(one: dict[str, Path], other: dict[str, Path]) -> bool:
    """Whether two processors are of the same files, byte by byte."""
    return one.keys() == other.keys() and all(
        path.read_bytes() == other[name].read_bytes() for name, path in one.items()
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _sees(file: Path) -> bool:
    """Whether a processor_config.json has an image processor in it, as transformers 5 writes it."""
    try:
        return "image_processor" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
