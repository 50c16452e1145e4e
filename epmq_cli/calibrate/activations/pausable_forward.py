"""A forward pass that pauses in front of chosen modules and resumes there.

**Why.** A block is calibrated step by step: the inputs of its first linears are measured, these are quantized, and only
then can the inputs of the next linears be measured, because they depend on the quantized outputs. With plain hooks,
each step needs another pass through the block from its start, although nothing in front of the step changes: n + 1
passes for n steps. A paused pass runs each module once. The passes of all batches run up to the first step and wait
there while it is quantized; then they continue, through the quantized linears, to the next step.

**How.** A pass is a greenlet: a stack of Python calls that can be left in the middle and entered again, without threads
and independently of the model's code in between. `run_until` switches to the pass's stack. A forward pre-hook on each
module (`pause_hooks`) asks the pass whether it pauses there and, if so, switches back to the caller, which gets the
module's input. The next `run_until`, or `finish`, switches to the stack again, and the hook returns.

    caller      run_until(["q", "k", "v"])     run_until(["out"])            finish()
                  |            ^                 |          ^                   |          ^
    pass          forward .... hook of q ....... q, k, v .. hook of out ....... out ...... output

**What to know.**
- Parameters may be replaced between two calls of `run_until`: the pass continues with the new values. The modules in
  front of the pause have run already, so they must be final.
- Hooks are found by the current greenlet, so the same module can be inside many waiting passes. Other passes through it
  are not affected.
- A waiting pass holds the variables of its calls: the residual stream, attention masks, caches. `held_tensors` lists
  their tensors so that the activation store can move them to disk meanwhile. No code may keep a reference to the pass
  inside its own stack, or it would never be freed; a pass that is dropped unwinds its stack with GreenletExit.
- Inference mode and other thread-local states of torch belong to the thread, not to the greenlet: caller and pass must
  run under the same ones. A pass cannot move to another thread.
- If a module is called twice in a pass, the first call counts.

Test: tests/calibrate/activations/test_replay.py compares every captured input of every family, bit by bit, with plain
hooks and one whole pass through the block for every step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import greenlet
from torch import Tensor, nn

from epmq_cli.calibrate.activations.routing import Router
from epmq_cli.runtime.block_offload import on_device

DEPTH = 2  # levels of containers that are searched: the arguments are a tuple, which may hold another container


class PausableForward:
    """One forward pass through modules with hooks (`pause_hooks`).

    `capture`: the modules whose inputs the pass captures; `captured`: these inputs. `router`: see HiddenState.
    """

    def __init__(self, forward: Callable[[], Any], router: Router | None = None) -> None:
        self._stack = _Stack(forward, self)
        self.router = router or Router()
        self._until: Collection[str] = ()
        self._here: tuple[str, Tensor] | None = None
        self._seen: set[str] = set()
        self.capture: Collection[str] = ()
        self.captured: dict[str, Tensor] = {}

    def run_until(self, names: Sequence[str]) -> Tensor:
        """Continues up to the first call of one of these modules, and returns its input."""
        if self._here is None or self._here[0] not in names:
            self._until, self._here = names, None
            self._stack.switch()
            if self._here is None:
                raise RuntimeError(f"the forward pass never called {' or '.join(names)}")
        return self._here[1]

    def finish(self) -> Any:
        """Continues to the end of the forward pass, and returns its output."""
        self._until, self._here = (), None
        self.captured.clear()
        return self._stack.switch()

    def held_tensors(self) -> list[Tensor]:
        """The tensors in the variables of the waiting calls, including those in containers, without parameters."""
        tensors, frame = list(self.captured.values()), self._stack.gr_frame
        while frame is not None:
            tensors += tensors_in(_variables(frame))
            frame = frame.f_back
        return [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]

    def pause_before(self, name: str, tensor: Tensor) -> bool:
        """Returns whether the pass pauses here. A module's hook calls this inside the pass.

        If a module is called again, as DeBERTa's keys are for positions, the first call counts.
        """
        if name in self._seen:
            return False
        self._seen.add(name)
        if name in self.capture:
            self.captured[name] = tensor
        self._here = (name, tensor) if name in self._until else None
        return self._here is not None


class _Stack(greenlet.greenlet):
    """The stack of a pass."""

    def __init__(self, forward: Callable[[], Any], forward_pass: PausableForward) -> None:
        super().__init__(forward)
        self.forward_pass = weakref.ref(forward_pass)


def _variables(frame: FrameType) -> list[Any]:
    """The values of a call's variables."""
    variables = frame.f_locals
    values = list(variables.values())
    if isinstance(variables, dict):  # before Python 3.13, a copy that would keep them alive
        variables.clear()
    return values


def tensors_in(values: Iterable[Any], depth: int = DEPTH) -> Iterator[Tensor]:
    """The tensors among the values, including those in tuples, lists and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, (tuple, list)):
            yield from tensors_in(value, depth - 1)
        elif depth and isinstance(value, dict):
            yield from tensors_in(value.values(), depth - 1)


def _present() -> PausableForward | None:
    """The pass whose stack runs."""
    stack = greenlet.getcurrent()
    return stack.forward_pass() if isinstance(stack, _Stack) else None


def _waits(name: str, tensor: Tensor) -> bool:
    forward_pass = _present()
    return forward_pass is not None and forward_pass.pause_before(name, tensor)


@contextmanager
def pause_hooks(module: nn.Module, names: Collection[str], routers: Collection[str] = ()) -> Iterator[None]:
    """Inside the block, passes through the module can pause in front of these of its modules, and record or repeat what
    its routers decide."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def pause(_: nn.Module, args: tuple[Any, ...]) -> None:
            if _waits(name, args[0]):  # no variable here may hold the pass: it would never be freed
                greenlet.getcurrent().parent.switch()  # type: ignore[union-attr]

        return pause

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    handles += [module.get_submodule(name).register_forward_hook(routing_hook(name)) for name in routers]
    try:
        with on_device(module):  # a pass may pause inside the module, so no pass may move its parameters
            yield
    finally:
        for handle in handles:
            handle.remove()


def routing_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """A forward hook of the router of this name, for `HiddenState.router`."""

    def route(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        forward_pass = _present()
        return output if forward_pass is None else forward_pass.router.route(name, output)

    return route
