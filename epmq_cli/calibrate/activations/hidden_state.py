"""The hidden states of batches between sections of a model, and the inputs of modules inside a section."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.calibrate.activations.pausable_forward import PausableForward, tensors_in
from epmq_cli.calibrate.activations.routing import Router
from epmq_cli.calibrate.activations.store import ActivationStore, OffloadHandle
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.moments import real_tokens
from epmq_cli.data.batching import ANSWERS, Batch
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Stack

if TYPE_CHECKING:
    from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of one call of a module, by position and by name."""


@dataclass(frozen=True)
class CarriedOutput:
    """A placeholder among the arguments of a block. It stands for the output of the block before it at this position,
    for example position biases, which the first block computes for all."""

    position: int


@dataclass
class HiddenState:
    """The hidden state of one batch in front of or inside a section.

    `hidden`: the first argument of the next section. `calls`: the other arguments of the remaining blocks. `mask`: the
    real tokens of the hidden state. `memory`: the real tokens of the input of cross-attention. Both are None if all
    tokens are real. `answers`: which tokens are the assistant's in conversations; None if all tokens count alike.
    `output`: the output values of the last block. `router`: the tokens that experts of the present section read.
    """

    hidden: Tensor
    calls: list[Call]
    mask: Tensor | None
    store: ActivationStore
    memory: Tensor | None = None
    answers: Tensor | None = None
    output: tuple[Any, ...] = ()
    forward_pass: PausableForward | None = None
    handle: OffloadHandle | None = None
    router: Router = field(default_factory=Router)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Loads the activations inside the context, and offloads them at its end."""
        self.load()
        yield
        self.offload()

    def offload(self) -> None:
        """Moves the activations to the store, except arguments of blocks, which other batches may share."""
        waiting = self.forward_pass.held_tensors() if self.forward_pass else []
        shared = {tensor.untyped_storage()._cdata for call in self.calls for tensor in tensors_in(call)}
        own = [tensor for tensor in waiting if tensor.untyped_storage()._cdata not in shared]
        self.handle = self.store.offload([self.hidden, *own])

    def load(self) -> Tensor:
        """Loads the activations from the store. Returns the first argument of the next section."""
        if self.handle is not None:
            self.handle.load()
            self.handle = None
        return self.hidden

    def weights(self, token: int | None, guidance: Guidance) -> Tensor | None:
        """Token weights (tokens,): 1 for `token` of each sample and the `readout_weight` of the rest, or 1 for answers
        and the `prompt_weight` of the rest. None if all tokens count alike."""
        weights = torch.ones_like(self.hidden[..., :1])
        if token is not None:
            weights.fill_(guidance.readout_weight)[:, token] = 1
        elif self.answers is not None:
            weights[~self.answers] = guidance.prompt_weight
        else:
            return None
        return real_tokens(weights, self.mask)[:, 0]

    def run_until(self, module: nn.Module, names: Sequence[str], capture: Collection[str] = ()) -> Tensor:
        """Continues through a section up to the first call of one of these modules, and returns its input.

        `capture`: modules on the way whose inputs are kept for `captured`. The section must have `pause_hooks`.
        """
        forward_pass = self._forward_pass(module)
        forward_pass.capture = capture
        return forward_pass.run_until(names)

    def captured(self, name: str) -> Tensor:
        """The captured input of a module."""
        assert self.forward_pass is not None
        return self.forward_pass.captured[name]

    def rewind(self) -> None:
        """Drops the pass through a section. The next pass starts at the section's input."""
        self.load()
        self.forward_pass = None
        self.offload()

    def finish(self, module: nn.Module) -> None:
        """Runs the rest of a section and continues with the next."""
        output = self._forward_pass(module).finish()
        values = output if isinstance(output, tuple) else (output,)
        self.hidden, self.output, self.calls, self.forward_pass = values[0], values, self.calls[1:], None

    def call(self) -> Call:
        """The arguments of the next section."""
        rest, options = self.calls[0] if self.calls else ((), {})
        args = (self.hidden, *(self._resolved(value) for value in rest))
        return args, {name: self._resolved(value) for name, value in options.items()}

    def _forward_pass(self, module: nn.Module) -> PausableForward:
        if self.forward_pass is None:
            args, named = self.call()
            self.forward_pass = PausableForward(lambda: module(*args, **named), self.router)
        return self.forward_pass

    def _resolved(self, value: Any) -> Any:
        return self.output[value.position] if isinstance(value, CarriedOutput) else value


class _ReachedError(Exception):
    """Raised inside a forward pass to end it when all arguments are recorded."""


def enter(
    model: nn.Module,
    family: Family,
    stack: Stack,
    batches: Sequence[Batch],
    store: ActivationStore,
    values: list[int] | None = None,
) -> list[HiddenState]:
    """Runs batches up to the first block of a stack, and offloads their hidden states. They have the exact arguments
    that the model passes to each block. `values`: see `_arguments`; pass the same list, empty at first, for all batches
    of a stack to save forward passes through a block."""
    blocks, streams, counts = [block.module for block in stack.blocks], [], [] if values is None else values
    for batch in batches:
        arguments = _arguments(blocks, lambda batch=batch: family.features(model, batch), counts)  # type: ignore[misc]
        calls = [(args[1:], options) for args, options in arguments]
        answers = batch[ANSWERS].bool() if ANSWERS in batch else None
        streams.append(HiddenState(arguments[0][0][0], calls, stack.mask(batch), store, stack.memory(batch), answers))
        streams[-1].offload()
    return streams


def handed(
    key: str, batches: Mapping[str, Sequence[Batch]], streams: Mapping[str, Sequence[HiddenState]]
) -> dict[str, Sequence[Batch]]:
    """Adds the outputs of a stack to each task's batches, as inputs of the next stack."""
    return {
        task: [{**batch, key: stream.load()} for batch, stream in zip(batches[task], states, strict=True)]
        for task, states in streams.items()
    }


def _arguments(blocks: Sequence[nn.Module], forward: Callable[[], object], values: list[int]) -> list[Call]:
    """The arguments of each block in a forward pass. The blocks return their input unchanged, and the call of the last
    block ends the pass. Further outputs of a block are `CarriedOutput`.

    `values`: a list with the number of values that a block returns; 0 if it does not return a tuple. If the list is
    empty, the first block runs once to fill it.
    """
    recorded: list[Call] = []

    def recorder(real: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **options: Any) -> Any:
            recorded.append((args, options))
            if len(recorded) == len(blocks):
                raise _ReachedError
            if not values:
                output = real(*args, **options)
                values.append(len(output) if isinstance(output, tuple) else 0)
            return (args[0], *map(CarriedOutput, range(1, values[0]))) if values[0] else args[0]

        return record

    forwards = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = recorder(block.forward)
    try:
        forward()
    except _ReachedError:
        return recorded
    finally:
        for block, own in zip(blocks, forwards, strict=True):
            del block.forward
            if own is not None:
                block.forward = own
    raise RuntimeError(f"the forward pass called {len(recorded)} of {len(blocks)} blocks")


def calls(modules: Sequence[nn.Module], forward: Callable[[], object]) -> list[Call]:
    """The arguments of the first call of each module in a forward pass. The pass ends when all have been called."""
    with _stopped_at(modules) as recorded:
        try:
            forward()
        except _ReachedError:
            return [recorded[id(module)] for module in modules]
    raise RuntimeError(f"the forward pass never called {type(modules[-1]).__name__}")


def inputs(modules: Sequence[nn.Module], forward: Callable[[], object]) -> list[Tensor]:
    """The first argument of the first call of each module, see `calls`."""
    return [args[0] for args, _ in calls(modules, forward)]


@contextmanager
def _stopped_at(modules: Sequence[nn.Module]) -> Iterator[dict[int, Call]]:
    recorded: dict[int, Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        recorded.setdefault(id(module), (args, options))
        if len(recorded) == len(modules):
            raise _ReachedError

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
