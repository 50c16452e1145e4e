"""A device that has room for a few samples at a time, as the linears of a model know it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import epmq_cli.pipeline.calibration
import epmq_cli.pipeline.steps
from epmq_cli.evaluate.score import Scorer

CALIBRATION = tuple((epmq_cli.pipeline.calibration, name) for name in ("run_teachers", "calibrate", "solve_heads"))
SCORES = (Scorer, "scores")
SCORING = ((epmq_cli.pipeline.steps, "score_parts"), (epmq_cli.pipeline.steps, "score"), SCORES)
Place = tuple[Any, str]
"""A module or class, and the name of a function in it."""


@dataclass
class Device:
    """Has room for `samples` samples at a time, once `after` calls of linears went well whatever their samples.

    `teacher`: whether it is the modules of the model that a function was called with that are short of room (False), or
    others (True), or all (None).
    """

    samples: int
    after: int = 0
    teacher: bool | None = None
    refused: int = 0

    def refuse(self, own: set[int], module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """In front of every call of a module: says of a linear with too many samples what CUDA says."""
        if not isinstance(module, nn.Linear) or self.teacher == (id(module) in own):
            return
        self.after -= 1
        if self.after < 0 and len(args[0]) > self.samples:
            self.refused += 1
            self.fail()

    def fail(self) -> None:
        """Raises what torch raises."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nOf which nothing is left.")

    @contextmanager
    def during(self, *places: Place) -> Iterator[None]:
        """Inside, these functions find the device so."""
        with ExitStack() as stack:
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, self._limited(getattr(owner, name))))
            yield

    def enter(self, *places: Place) -> None:
        """From here to the end of the process these functions find the device so."""
        for owner, name in places:
            setattr(owner, name, self._limited(getattr(owner, name)))

    def _limited(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*args: Any, **options: Any) -> Any:
            models = [value for value in args if isinstance(value, nn.Module)]
            own = {id(module) for model in models for module in model.modules()}
            handle = register_module_forward_pre_hook(lambda module, given: self.refuse(own, module, given))
            try:
                return real(*args, **options)
            finally:
                handle.remove()

        return limited
