"""Models on a GPU whose blocks are in host memory or in files, and come to the GPU when they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


def offload_blocks(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Moves a model to the device, except the parameters of its blocks: these come to the device for the time of the
    block's forward pass, or of `on_device`."""
    kept = {id(parameter) for block in blocks for parameter in block.parameters()}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in kept:
            tensor.data = tensor.data.to(device)
    for block in blocks:
        block.__class__ = _offloaded(type(block), device)


def _offloaded(cls: type[nn.Module], device: torch.device) -> type[nn.Module]:
    """The class of a block that is on the device during its forward pass."""

    @wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **options: Any) -> Any:
        with _moved(self, device, changed=False):
            return cls.forward(self, *args, **options)

    return type(cls.__name__, (cls,), {"forward": forward, "epmq_device": device})


@contextmanager
def on_device(block: nn.Module) -> Iterator[None]:
    """Inside the context, an offloaded block is on its device. Other modules stay where they are."""
    with _moved(block, getattr(type(block), "epmq_device", None), changed=True):
        yield


@contextmanager
def _moved(block: nn.Module, device: torch.device | None, changed: bool) -> Iterator[None]:
    """`changed`: whether new values on the device are copied back."""
    own = [] if device is None else [(tensor, tensor.data) for tensor in block.parameters() if tensor.device != device]
    try:
        with torch.inference_mode(False):  # tensors of inference mode could not be changed outside it
            for tensor, host in own:
                tensor.data = host.to(device)
        yield
    finally:
        for tensor, host in own:
            if changed and tensor.data is not host:
                host.copy_(tensor.data)
            tensor.data = host
