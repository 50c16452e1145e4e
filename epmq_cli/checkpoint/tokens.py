"""Whether an expert reads texts with the tokens of its base, as far as their files say: the same words must have the
same numbers, or rows of the embeddings that mean different words are merged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.errors import ModelError

TOKENIZER, WORDS = "tokenizer.json", "vocab.txt"


def check_tokens(base: ModelFolder, expert: ModelFolder) -> None:
    """ModelError where base and expert both have a tokenizer.json or vocab.txt, and a token has another number in the
    one than in the other. Tokens that only one of them has are none of its business: see `vocabulary` of a suite."""
    for file in (TOKENIZER, WORDS):
        paths = [model.path / file for model in (base, expert)]
        if not all(path.is_file() for path in paths) or paths[0].read_bytes() == paths[1].read_bytes():
            continue
        own, other = (numbers(path, model.role) for path, model in zip(paths, (base, expert), strict=True))
        found = next((token for token, number in own.items() if other.get(token, number) != number), None)
        if found is not None:
            raise ModelError(
                f"{expert.role} ({expert.path}) has another tokenizer than the base ({base.path}): token {found!r} is "
                f"{other[found]} in its {file} and {own[found]} in the base's"
            )


def numbers(path: Path, role: str) -> dict[str, int]:
    """Token -> number, of a tokenizer.json or vocab.txt; ModelError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.name == WORDS:
            return _numbered(text.removesuffix("\n").split("\n"))
        content = json.loads(text)
        known: Any = content["model"]["vocab"]
        found = dict(known) if isinstance(known, dict) else _numbered(token for token, _ in known)  # Unigram: scores
        return found | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{role}: {path} cannot be read as a tokenizer ({error}); fetch it again") from error


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}
