"""Batches of model inputs, and how they are split."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""Model inputs by keyword, the first axis being samples."""

ALL = sys.maxsize  # samples of a batch


Collate = Callable[[list[Any]], Batch]


def size(batch: Batch) -> int:
    """How many samples there are."""
    return len(next(iter(batch.values())))


def split(batch: Batch, samples: int) -> list[Batch]:
    """The samples of a batch in parts of at most so many, padded as they are; the batch itself where it has no more."""
    if size(batch) <= samples:
        return [batch]
    parts = zip(*(torch.split(tensor, samples) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]
