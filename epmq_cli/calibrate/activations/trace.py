"""What the modules of a section do in a forward pass, and passes in which they, or whole blocks, do something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.families.structure import Section


@dataclass
class Trace:
    """What the modules of a section did in one pass: `calls` in order, input and output of the first call of each, and
    what the section gave."""

    calls: list[str] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    given: Tensor = field(default_factory=lambda: torch.zeros(()))


Change = Callable[[str, Tensor, Trace], Tensor]
"""What a module gives instead of its own output, by its name and what the pass did so far."""


@contextmanager
def traced(section: Section, change: Change | None) -> Iterator[Trace]:
    """Inside, what the step's modules do is noted, and their first outputs are replaced by what `change` says."""
    trace, handles = Trace(), []

    def watch(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            trace.calls.append(name)
            trace.inputs.setdefault(name, args[0].clone())

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if name in trace.outputs:
                return None
            given = output if change is None else change(name, output, trace)
            trace.outputs[name] = given.clone()
            return given

        handles.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

    for name in section.modules:
        watch(name, section.module.get_submodule(name))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bypassed(blocks: Sequence[Section], values: int) -> Iterator[list[Tensor]]:
    """Inside, blocks give back their first argument, as the first of so many values, or alone where that is 0; what
    each was given."""
    met: list[Tensor] = []

    def bypass(*args: Any, **options: Any) -> Any:
        met.append(args[0])
        return (args[0], *[None] * (values - 1)) if values else args[0]

    kept = [block.module.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.module.forward = bypass
    try:
        yield met
    finally:
        for block, own in zip(blocks, kept, strict=True):
            del block.module.forward
            if own is not None:
                block.module.forward = own
