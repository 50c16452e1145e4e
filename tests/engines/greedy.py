"""The tokens that transformers writes, the oracle of every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import epmq_cli

PROMPT, COUNT = [5, 17, 100, 42, 9, 77], 8


def by_transformers(
    checkpoint: Path, prompt: list[int] = PROMPT, count: int = COUNT, without: int | None = None
) -> list[tuple[int, float]]:
    """The most likely tokens after the prompt, with their log-probabilities, in float32. `without`: a token that is
    never written."""
    model: Any = epmq_cli.load(checkpoint, device="cpu", kernel="dequantize")
    tokens, found = [*prompt], []
    for _ in range(count):
        values = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        tokens.append(max((n for n in range(len(values)) if n != without), key=values.__getitem__))
        found.append((tokens[-1], float(values[tokens[-1]])))
    return found
