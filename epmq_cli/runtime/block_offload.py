"""Models on a GPU whose large weights are in host memory or in files, and come to the GPU when they run: blocks and
output layers. Embeddings are looked up where they are, and the result comes to the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

LARGE = 1 << 25  # bytes; smaller weights outside of blocks stay on the device


def offload_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, others: Sequence[nn.Embedding | nn.Linear] = ()
) -> None:
    """Moves a model to the device, except the parameters of its blocks and of others that are large: these come to the
    device for the time of the forward pass, or a block's of `on_device`. Embeddings stay, and run where they are."""
    outside = large(others)
    kept = {id(tensor) for block in blocks for tensor in block.parameters()}
    kept |= {id(tensor) for module in outside for tensor in (*module.parameters(), *module.buffers())}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in kept:
            tensor.data = tensor.data.to(device)
    for block in blocks:
        block.__class__ = _offloaded(type(block), device)
    if hasattr(type(model), "device"):  # of transformers: by default, where the first weight is
        model.__class__ = type(type(model).__name__, (type(model),), {"device": property(lambda _: device)})
    for module in outside:
        (_look_up_on_host if isinstance(module, torch.nn.Embedding) else _move_to_run)(module, device)


def large(modules: Sequence[nn.Embedding | nn.Linear]) -> list[nn.Embedding | nn.Linear]:
    """Those whose weights are large in float32."""
    return [module for module in modules if 4 * module.weight.numel() >= LARGE]


def _look_up_on_host(table: nn.Module, device: torch.device) -> None:
    """Lets an embedding look up the device's tokens on the host."""
    host = next(table.parameters()).device

    def before(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(_to(arg, host) for arg in args), {name: _to(arg, host) for name, arg in options.items()}

    table.register_forward_pre_hook(before, with_kwargs=True)
    table.register_forward_hook(lambda _, args, output: _to(output, device))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _move_to_run(linear: nn.Module, device: torch.device) -> None:
    """Lets a linear be on the device while it runs. Hooks leave its class as it is, by which linears are found."""
    own: list[tuple[Tensor, Tensor]] = []

    def after(*_: Any) -> None:
        while own:
            tensor, host = own.pop()
            tensor.data = host

    linear.register_forward_pre_hook(lambda *_: _to_device(linear, device, own))
    linear.register_forward_hook(after, always_call=True)


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
    own: list[tuple[Tensor, Tensor]] = []
    try:
        if device is not None:
            _to_device(block, device, own)
        yield
    finally:
        for tensor, host in own:
            if changed and tensor.data is not host:
                host.copy_(tensor.data)
            tensor.data = host


def _to_device(module: nn.Module, device: torch.device, own: list[tuple[Tensor, Tensor]]) -> None:
    """Moves a module's parameters to the device. Adds each that was not there with its present values to `own`."""
    with torch.inference_mode(False):  # tensors of inference mode could not be changed outside it
        for tensor in module.parameters():
            if tensor.device != device:
                own.append((tensor, tensor.data))
                tensor.data = tensor.data.to(device)
