"""Simulates a device whose memory fits only a few samples at a time, by hooks on linears."""

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
    """Fits `samples` samples at a time, after the first `after` calls of linears, which always succeed.

    `teacher`: which modules run out of memory: those of the models passed to the patched function (False), others
    (True), or all (None).
    """

    samples: int
    after: int = 0
    teacher: bool | None = None
    refused: int = 0

    def refuse(self, own: set[int], module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Pre-hook of all modules: raises CUDA's error for linears with too many samples."""
        if not isinstance(module, nn.Linear) or self.teacher == (id(module) in own):
            return
        self.after -= 1
        if self.after < 0 and len(args[0]) > self.samples:
            self.refused += 1
            self.fail()

    def fail(self) -> None:
        """Raises the error of torch."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nOf which nothing is left.")

    @contextmanager
    def during(self, *places: Place) -> Iterator[None]:
        """Inside the context, these functions run on this device."""
        with ExitStack() as stack:
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, self._limited(getattr(owner, name))))
            yield

    def enter(self, *places: Place) -> None:
        """From now on, these functions run on this device in this process."""
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
