"""Replaces the weights of a model in place, for good or inside a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def copy_into(model: nn.Module, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
    """Puts these values into the model's own tensors of the same names, one after the other."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            own[name].copy_(tensor)


@contextmanager
def swapped_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these values inside the block, with its own after it."""
    own = model.state_dict()
    kept = {name: own[name].clone() for name in tensors}
    try:
        copy_into(model, tensors)
        yield
    finally:
        copy_into(model, kept)
