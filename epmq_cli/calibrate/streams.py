"""Activations on their way through a model: batches between two sections, and the inputs of modules inside one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from epmq_cli.families.family import Batch, Family

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of one call of a module, by position and by name."""


@dataclass
class Stream:
    """One batch on its way through the blocks: the next section's first argument, the others that every block gets, and
    the mask of real tokens."""

    hidden: Tensor
    rest: tuple[Any, ...]
    options: dict[str, Any]
    mask: Tensor | None

    def through(self, module: nn.Module) -> Tensor:
        """What a block makes of it."""
        output = module(self.hidden, *self.rest, **self.options)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


class _ReachedError(Exception):
    """Raised inside a forward pass to end it once what was wanted has been caught."""


def enter(model: nn.Module, family: Family, first: nn.Module, batches: Sequence[Batch]) -> list[Stream]:
    """The batches at the first block, with the very arguments that the model itself passes to it."""
    streams = []
    for batch in batches:
        args, options = calls([first], lambda batch=batch: family.features(model, batch))[0]  # type: ignore[misc]
        streams.append(Stream(args[0], args[1:], options, family.token_mask(batch)))
    return streams


def calls(modules: Sequence[nn.Module], forward: Callable[[], object]) -> list[Call]:
    """The arguments with which a forward pass calls each module; the pass ends when all have been called."""
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
        caught[id(module)] = (args, options)
        if len(caught) == len(modules):
            raise _ReachedError

    handles = [module.register_forward_pre_hook(catch, with_kwargs=True) for module in modules]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
