"""The files of a model folder that its tokenizer or image processor is made of; transformers is not asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PIXELS = "preprocessor_config.json"
WHOLE = "processor_config.json"  # of a processor for pictures and texts, with the image processor inside
VOCABULARY = ("tokenizer.json", "vocab", "merges", "bpe.", "dict.txt", "tekken.json")
"""How the names of files with tokens begin; without one of them there is no tokenizer."""
VOCABULARY_ENDS = (".model", ".bpe", ".codes", ".tiktoken")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
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
    found = {name: file for name, file in files.items() if _has_tokens(name)}
    return found | {name: file for name, file in files.items() if name in BESIDE} if found else {}


def same_files(one: dict[str, Path], other: dict[str, Path]) -> bool:
    """Whether two processors are of the same files, byte by byte."""
    return one.keys() == other.keys() and all(
        path.read_bytes() == other[name].read_bytes() for name, path in one.items()
    )


def _has_tokens(name: str) -> bool:
    return name.startswith(VOCABULARY) or name.endswith(VOCABULARY_ENDS)


def _sees(file: Path) -> bool:
    """Whether a processor_config.json has an image processor in it, as transformers 5 writes it."""
    try:
        return "image_processor" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
