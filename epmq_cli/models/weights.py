"""Replaces the weights of a model in place, permanently or inside a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def copy_into(model: nn.Module, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
    """Copies each value into the model's tensor of the same name, one after the other."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            own[name].copy_(tensor)


@contextmanager
def swapped_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives the model these values inside the block, and restores its own afterwards."""
    own = model.state_dict()
    backup = {name: own[name].clone() for name in tensors}
    try:
        copy_into(model, tensors)
        yield
    finally:
        copy_into(model, backup)
