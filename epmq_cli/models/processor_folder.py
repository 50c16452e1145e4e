"""The files of a model folder that its tokenizer or image processor is made of; transformers is not asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from epmq_cli.models.processor_files import TEMPLATES, TOKENIZER, matches, own_files

PIXELS = "preprocessor_config.json"
WHOLE = "processor_config.json"  # of a processor for pictures and texts, with the image processor inside
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "dict.txt")
"""What says how a tokenizer works, and is none by itself."""


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
    files = {name: path / name for name in own_files(path)}
    if reads == "pictures":
        return {name: file for name, file in files.items() if name == PIXELS or (name == WHOLE and _sees(file))}
    found = {name: file for name, file in files.items() if name in SETTINGS or matches(name, (*TOKENIZER, *TEMPLATES))}
    return found if any(name not in SETTINGS and not matches(name, TEMPLATES) for name in found) else {}


def same_files(one: dict[str, Path], other: dict[str, Path]) -> bool:
    """Whether two processors are of the same files, byte by byte."""
    return one.keys() == other.keys() and all(
        path.read_bytes() == other[name].read_bytes() for name, path in one.items()
    )


def _sees(file: Path) -> bool:
    """Whether a processor_config.json has an image processor in it, as transformers 5 writes it."""
    try:
        return "image_processor" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
