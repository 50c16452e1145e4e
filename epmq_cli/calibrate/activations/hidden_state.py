"""Activations on their way through a model: batches between two sections, and the inputs of modules inside one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.activations.pausable_forward import PausableForward, tensors_in
from epmq_cli.calibrate.activations.store import ActivationStore, OffloadHandle
from epmq_cli.calibrate.moments import real_tokens
from epmq_cli.data.batching import Batch
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Stack

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of one call of a module, by position and by name."""


@dataclass(frozen=True)
class CarriedOutput:
    """Stands, among the arguments of a block, for what the block before it gave back at this position of its output:
    position biases, for instance, which the first block makes for all."""

    position: int


@dataclass
class HiddenState:
    """One batch on its way through the blocks.

    `hidden`: the next section's first argument. `calls`: the other arguments of the blocks to come. `mask`: the real
    tokens of the stream, `memory` those of what cross-attention reads; None where all are. `output`: what the last
    block gave back, if that was a tuple.
    """

    hidden: Tensor
    calls: list[Call]
    mask: Tensor | None
    store: ActivationStore
    memory: Tensor | None = None
    output: tuple[Any, ...] = ()
    forward_pass: PausableForward | None = None
    handle: OffloadHandle | None = None

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Its activations are there inside, and wait in the depot after it."""
        self.load()
        yield
        self.offload()

    def offload(self) -> None:
        """Puts its activations into the depot, but for arguments of blocks, which other batches may share."""
        waiting = self.forward_pass.held_tensors() if self.forward_pass else []
        shared = {tensor.untyped_storage()._cdata for call in self.calls for tensor in tensors_in(call)}
        own = [tensor for tensor in waiting if tensor.untyped_storage()._cdata not in shared]
        self.handle = self.store.offload([self.hidden, *own])

    def load(self) -> Tensor:
        """The next section's first argument, with all that waited out of the depot."""
        if self.handle is not None:
            self.handle.load()
            self.handle = None
        return self.hidden

    def weights(self, token: int | None, others: float) -> Tensor | None:
        """1 for this token of each sample, a number for the others: (tokens,); None, where there is none, for all 1."""
        if token is None:
            return None
        weights = torch.full_like(self.hidden[..., :1], others)
        weights[:, token] = 1
        return real_tokens(weights, self.mask)[:, 0]

    def run_until(self, module: nn.Module, names: Sequence[str], wanted: Collection[str] = ()) -> Tensor:
        """Goes on through a section up to the first of these modules, of which it gives the input.

        `wanted`: modules on the way whose input will be asked for (`captured`). The section must be listened to.
        """
        self._passage(module).wanted = wanted
        return self._passage(module).run_until(names)

    def captured(self, name: str) -> Tensor:
        """The input of a module that was wanted."""
        assert self.forward_pass is not None
        return self.forward_pass.captured[name]

    def rewind(self) -> None:
        """Drops the pass through a section, so that the next one begins at its input."""
        self.load()
        self.forward_pass = None
        self.offload()

    def finish(self, module: nn.Module) -> None:
        """Goes through the rest of a section, to the next."""
        output = self._passage(module).finish()
        found = output if isinstance(output, tuple) else (output,)
        self.hidden, self.output, self.calls, self.forward_pass = found[0], found, self.calls[1:], None

    def _passage(self, module: nn.Module) -> PausableForward:
        if self.forward_pass is None:
            rest, options = self.calls[0] if self.calls else ((), {})
            args = (self.hidden, *(self._resolved(value) for value in rest))
            named = {name: self._resolved(value) for name, value in options.items()}
            self.forward_pass = PausableForward(lambda: module(*args, **named))
        return self.forward_pass

    def _resolved(self, value: Any) -> Any:
        return self.output[value.position] if isinstance(value, CarriedOutput) else value


class _ReachedError(Exception):
    """Raised inside a forward pass to end it once what was wanted has been caught."""


def enter(
    model: nn.Module,
    family: Family,
    stack: Stack,
    batches: Sequence[Batch],
    store: ActivationStore,
    values: list[int] | None = None,
) -> list[HiddenState]:
    """The batches at the first block of a stack, with the very arguments that the model itself passes to each of its
    blocks; they wait in the depot. `values`: see `_arguments`; a list that is empty for the first batches of a stack
    and handed on to the others saves a pass through a block."""
    blocks, streams, known = [block.module for block in stack.blocks], [], [] if values is None else values
    for batch in batches:
        found = _arguments(blocks, lambda batch=batch: family.features(model, batch), known)  # type: ignore[misc]
        calls = [(args[1:], options) for args, options in found]
        streams.append(HiddenState(found[0][0][0], calls, stack.mask(batch), store, stack.memory(batch)))
        streams[-1].offload()
    return streams


def handed(
    key: str, batches: Mapping[str, Sequence[Batch]], streams: Mapping[str, Sequence[HiddenState]]
) -> dict[str, Sequence[Batch]]:
    """Each task's batches with what came out of a stack, for the next one."""
    return {
        task: [{**batch, key: stream.load()} for batch, stream in zip(batches[task], found, strict=True)]
        for task, found in streams.items()
    }


def _arguments(blocks: Sequence[nn.Module], forward: Callable[[], object], values: list[int]) -> list[Call]:
    """The arguments of each block in a forward pass in which blocks only pass their input on, and the last ends it;
    what else a block gives to the next is `CarriedOutput`.

    `values`: how many values a block gives back, 0 where it is no tuple; put there, for the next batch, by the first
    block, which is called for it, where it is empty.
    """
    caught: list[Call] = []

    def recorder(real: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **options: Any) -> Any:
            caught.append((args, options))
            if len(caught) == len(blocks):
                raise _ReachedError
            if not values:
                output = real(*args, **options)
                values.append(len(output) if isinstance(output, tuple) else 0)
            return (args[0], *map(CarriedOutput, range(1, values[0]))) if values[0] else args[0]

        return record

    kept = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = recorder(block.forward)
    try:
        forward()
    except _ReachedError:
        return caught
    finally:
        for block, own in zip(blocks, kept, strict=True):
            del block.forward
            if own is not None:
                block.forward = own
    raise RuntimeError(f"the forward pass called {len(caught)} of {len(blocks)} blocks")


def calls(modules: Sequence[nn.Module], forward: Callable[[], object]) -> list[Call]:
    """The arguments with which a forward pass first calls each module; the pass ends when all have been called."""
    with _stopped_at(modules) as caught:
        try:
            forward()
        except _ReachedError:
            return [caught[id(module)] for module in modules]
    raise RuntimeError(f"the forward pass never called {type(modules[-1]).__name__}")


def inputs(modules: Sequence[nn.Module], forward: Callable[[], object]) -> list[Tensor]:
    """The first argument of each of `calls`."""
    return [args[0] for args, _ in calls(modules, forward)]


@contextmanager
def _stopped_at(modules: Sequence[nn.Module]) -> Iterator[dict[int, Call]]:
    caught: dict[int, Call] = {}

    def catch(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        caught.setdefault(id(module), (args, options))
        if len(caught) == len(modules):
            raise _ReachedError

    handles = [module.register_forward_pre_hook(catch, with_kwargs=True) for module in modules]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
