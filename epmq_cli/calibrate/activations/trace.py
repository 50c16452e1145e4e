"""Records the modules of a section in a forward pass, and replaces the outputs of modules or whole blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.activations.pausable_forward import routing_hook
from epmq_cli.families.structure import Section


@dataclass
class Trace:
    """A record of one pass through a section. `calls`: the called modules in order. `inputs` and `outputs`: those of
    the first call of each module. `output`: the output of the section."""

    calls: list[str] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor = field(default_factory=lambda: torch.zeros(()))


Change = Callable[[str, Tensor, Trace], Tensor]
"""Returns a module's replacement output from its name, its own output and the trace so far."""


@contextmanager
def traced(section: Section, change: Change | None, hidden: Tensor) -> Iterator[Trace]:
    """Inside the context, records the calls of the section's modules. `change` replaces their first outputs. `hidden`:
    the section's input; activations whose tokens are flattened are recorded with its samples and tokens. Hidden states
    record or repeat what routers decide."""
    trace, handles = Trace(), []

    def apart(activation: Tensor) -> Tensor:
        flattened = activation.ndim == 2 < hidden.ndim and len(activation) == hidden[..., 0].numel()
        return activation.reshape(*hidden.shape[:-1], -1) if flattened else activation

    def watch(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            trace.calls.append(name)
            trace.inputs.setdefault(name, apart(args[0]).clone())

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if name in trace.outputs:
                return None
            replacement = output if change is None else change(name, apart(output), trace).reshape(output.shape)
            trace.outputs[name] = apart(replacement).clone()
            return replacement

        handles.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

    for name in section.modules:
        watch(name, section.module.get_submodule(name))
    for name in section.routers:
        handles.append(section.module.get_submodule(name).register_forward_hook(routing_hook(name)))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bypassed(blocks: Sequence[Section], values: int) -> Iterator[list[Tensor]]:
    """Inside the context, blocks return their first argument: alone if `values` is 0, else as the first of `values`
    values. Yields the list of these arguments."""
    block_inputs: list[Tensor] = []

    def bypass(*args: Any, **options: Any) -> Any:
        block_inputs.append(args[0])
        return (args[0], *[None] * (values - 1)) if values else args[0]

    forwards = [block.module.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.module.forward = bypass
    try:
        yield block_inputs
    finally:
        for block, own in zip(blocks, forwards, strict=True):
            del block.module.forward
            if own is not None:
                block.module.forward = own
