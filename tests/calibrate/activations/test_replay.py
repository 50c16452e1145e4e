"""Oracle: plain forward hooks and a whole pass through the block for every step. Paused passes capture the same
inputs, bit by bit, for every family."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epmq_cli.calibrate.activations.capture import CaptureSpec
from epmq_cli.calibrate.activations.hidden_state import Call, CarriedOutput, enter
from epmq_cli.calibrate.activations.pausable_forward import pause_hooks
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.families.structure import Linears, Section, Stack
from tests.helpers.hubs import Scene
from tests.helpers.minihub import KINDS, build
from tests.helpers.tiers import only


class Replay:
    """One batch before a block. Every method runs the whole block again from its start."""

    def __init__(self, hidden: Tensor, calls: list[Call]) -> None:
        self.hidden, self.calls = hidden, calls
        self.output: tuple[Any, ...] = ()

    def run(self, module: nn.Module) -> Any:
        """The block's output."""
        args, options = self.calls[0] if self.calls else ((), {})
        rest = [self._value(value) for value in args]
        return module(self.hidden, *rest, **{name: self._value(value) for name, value in options.items()})

    def inputs(self, module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """The first input of each of these modules, in call order."""
        caught: dict[str, Tensor] = {}

        def catch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                caught.setdefault(name, args[0].clone())

            return hook

        handles = [module.get_submodule(name).register_forward_pre_hook(catch(name)) for name in names]
        self.run(module)
        for handle in handles:
            handle.remove()
        return caught

    def advance(self, module: nn.Module) -> None:
        """Moves on to the next block."""
        output = self.run(module)
        self.output = output if isinstance(output, tuple) else (output,)
        self.hidden, self.calls = self.output[0], self.calls[1:]

    def _value(self, value: Any) -> Any:
        return self.output[value.position] if isinstance(value, CarriedOutput) else value


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature hub of a kind."""
    kind = request.param
    made: Path = request.getfixturevalue(f"{kind}_hub") if kind in ("bert", "clip") else None
    return made or build(tmp_path_factory.mktemp(kind), kind)


def change(module: nn.Module, names: Sequence[str]) -> None:
    """Stands for solving a step: later steps read the changed outputs."""
    generator = torch.Generator().manual_seed(len(names))
    for name in names:
        for parameter in module.get_submodule(name).parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("folder", only(("bert", "clip", "t5"), ("bert", "clip", *KINDS)), indirect=True)
def test_paused_passes_capture_what_a_replay_with_hooks_captures(folder: Path) -> None:
    scene, captured = Scene(folder), 0
    batches = scene.batches
    with torch.inference_mode():
        for stack in scene.family.stacks(scene.model):
            streams = enter(scene.model, scene.family, stack, batches, ActivationStore(math.inf))
            replays = [Replay(stream.hidden.clone(), list(stream.calls)) for stream in streams]
            for section in stack.sections:
                captured += check_section(stack, section, streams, replays)
            if stack.handed:
                batches = [{**b, stack.handed: s.load()} for b, s in zip(batches, streams, strict=True)]
    assert captured > 0


def check_section(stack: Stack, section: Section, streams: Sequence[Any], replays: Sequence[Replay]) -> int:
    """Compares the inputs of every step and the output of the section; returns the number of inputs compared."""
    compared, module = 0, section.module
    with pause_hooks(module, section.modules):
        for index, step in enumerate(section.steps):
            reading = CaptureSpec.of(section.steps[index:], None)
            residual = [reading.stream] if reading.stream else []
            for stream, replay in zip(streams, replays, strict=True):
                with stream.loaded():
                    found = reading.rows(stream, module)
                caught = replay.inputs(module, [*reading.names, *residual])
                wanted = [
                    next(caught[name] for name in caught if name in reading.names),
                    *(caught[n] for n in residual),
                ]
                mask = stream.memory if reading.memory else stream.mask
                for rows, whole in zip(found, wanted, strict=True):
                    assert torch.equal(
                        rows, whole[mask] if mask is not None and whole.ndim > 2 else whole.flatten(0, -2)
                    )
                    compared += 1
            change(module, step.names if isinstance(step, Linears) else [step.name])
        for stream, replay in zip(streams, replays, strict=True):
            with stream.loaded():
                stream.finish(module)
            replay.advance(module)
            assert torch.equal(stream.hidden, replay.hidden)
    return compared
