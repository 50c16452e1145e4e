"""Batches of model inputs, and functions that split them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]
"""Model inputs by keyword; the first axis is samples."""

Batches = Mapping[str, Sequence[Batch]]
"""The batches of each task."""

ALL = sys.maxsize  # as a number of samples: no limit
ANSWERS = "answers"
"""The tensor of a batch that is 1 for the tokens of the assistant's words and 0 for others: (samples, tokens)."""


Collate = Callable[[list[Any]], Batch]


def size(batch: Batch) -> int:
    """The number of samples."""
    return len(next(iter(batch.values())))


def device_of(batches: Batches) -> torch.device:
    """The device of the batches, on which models compute, wherever their weights wait."""
    return next(tensor.device for group in batches.values() for batch in group for tensor in batch.values())


def without(batch: Batch, names: Collection[str]) -> Batch:
    """The batch without some of its tensors."""
    return {name: tensor for name, tensor in batch.items() if name not in names}


def split(batch: Batch, samples: int) -> list[Batch]:
    """Splits a batch into parts of at most `samples` samples, with unchanged padding."""
    if size(batch) <= samples:
        return [batch]
    parts = zip(*(torch.split(tensor, samples) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]
