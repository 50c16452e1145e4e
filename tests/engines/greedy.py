"""The tokens that transformers writes, the oracle of every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import epmq_cli

PROMPT, COUNT = [5, 17, 100, 42, 9, 77], 8


def by_transformers(checkpoint: Path) -> list[tuple[int, float]]:
    """The most likely tokens after the prompt, with their log-probabilities, in float32."""
    model: Any = epmq_cli.load(checkpoint, device="cpu", kernel="dequantize")
    tokens, found = [*PROMPT], []
    for _ in range(COUNT):
        values = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        tokens.append(int(values.argmax()))
        found.append((tokens[-1], float(values.max())))
    return found
