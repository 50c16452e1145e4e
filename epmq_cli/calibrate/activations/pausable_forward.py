"""A forward pass that stops in front of modules and goes on from there, so that what is measured on the way and changed
behind it costs no second pass.

Each pass is a greenlet: a stack of calls that can be left and returned to, whatever the code of the model between.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import greenlet
from torch import Tensor, nn

DEPTH = 2  # of the containers of a call that are looked into: its arguments are a tuple, which may hold one


class PausableForward:
    """One forward pass through modules that are listened to (`listening`).

    `captured`: the inputs of modules that it went through, of those in `wanted`.
    """

    def __init__(self, forward: Callable[[], Any]) -> None:
        self._stack = _Stack(forward, self)
        self._until: Collection[str] = ()
        self._here: tuple[str, Tensor] | None = None
        self._seen: set[str] = set()
        self.wanted: Collection[str] = ()
        self.captured: dict[str, Tensor] = {}

    def run_until(self, names: Sequence[str]) -> Tensor:
        """The input of that one of these modules which is called first; the pass waits in front of it."""
        if self._here is None or self._here[0] not in names:
            self._until, self._here = names, None
            self._stack.switch()
            if self._here is None:
                raise RuntimeError(f"the forward pass never called {' or '.join(names)}")
        return self._here[1]

    def finish(self) -> Any:
        """What the forward pass gives back."""
        self._until, self._here = (), None
        self.captured.clear()
        return self._stack.switch()

    def held_tensors(self) -> list[Tensor]:
        """What the calls that wait here hold: the variables of each, and what is in those that are containers, but for
        parameters."""
        found, frame = list(self.captured.values()), self._stack.gr_frame
        while frame is not None:
            found += tensors_in(_variables(frame))
            frame = frame.f_back
        return [tensor for tensor in found if not isinstance(tensor, nn.Parameter)]

    def pause_before(self, name: str, tensor: Tensor) -> bool:
        """Called by the modules, in the pass; whether it is to wait here.

        Of a module that is called again, as DeBERTa's keys are for positions, the first call counts.
        """
        if name in self._seen:
            return False
        self._seen.add(name)
        if name in self.wanted:
            self.captured[name] = tensor
        self._here = (name, tensor) if name in self._until else None
        return self._here is not None


class _Stack(greenlet.greenlet):
    """The calls of a pass."""

    def __init__(self, forward: Callable[[], Any], forward_pass: PausableForward) -> None:
        super().__init__(forward)
        self.forward_pass = weakref.ref(forward_pass)


def _variables(frame: FrameType) -> list[Any]:
    """The values of a call's variables."""
    variables = frame.f_locals
    found = list(variables.values())
    if isinstance(variables, dict):  # before Python 3.13 a copy that the call would keep, and all that is in it
        variables.clear()
    return found


def tensors_in(values: Iterable[Any], depth: int = DEPTH) -> Iterator[Tensor]:
    """The tensors among some values, and those in tuples, lists and dicts among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, (tuple, list)):
            yield from tensors_in(value, depth - 1)
        elif depth and isinstance(value, dict):
            yield from tensors_in(value.values(), depth - 1)


def _waits(name: str, tensor: Tensor) -> bool:
    stack = greenlet.getcurrent()
    forward_pass = stack.forward_pass() if isinstance(stack, _Stack) else None
    return forward_pass is not None and forward_pass.pause_before(name, tensor)


@contextmanager
def pause_hooks(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Inside, passes through the module stop in front of these of its modules, if they want to."""

    def listener(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hear(_: nn.Module, args: tuple[Any, ...]) -> None:
            if _waits(name, args[0]):  # no name here may hold the pass, which would then never be freed
                greenlet.getcurrent().parent.switch()  # type: ignore[union-attr]

        return hear

    handles = [module.get_submodule(name).register_forward_pre_hook(listener(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
