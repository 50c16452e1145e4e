"""Trains a student on its experts' outputs, epoch by epoch, and keeps the weights with the lowest held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from epmq_cli.calibrate.merge_data import trained
from epmq_cli.calibrate.progress_file import opened, write_tensors
from epmq_cli.data.batch_order import own_numbers, shuffled
from epmq_cli.data.batching import Batch, size, split
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.families.family import Family
from epmq_cli.families.tasks.adapter import Head
from epmq_cli.models.weights import copy_into
from epmq_cli.refine.soft_labels import SoftLabels, outputs
from epmq_cli.runtime import distributed
from epmq_cli.runtime.console import track


@dataclass(frozen=True)
class Example:
    """A batch of a task with its expert's outputs."""

    batch: Batch
    labels: SoftLabels


Examples = Mapping[str, Sequence[Sequence[Example]]]
"""By task, the parts of each batch; with several processes, those of this one."""


@dataclass(frozen=True)
class Student:
    """The model to train and the data: examples to fit and to hold out, heads, and weights of the tasks' losses."""

    model: nn.Module
    family: Family
    names: Sequence[str]
    """The tensors to train."""
    fitted: Examples
    held: Examples
    heads: Mapping[str, Head]
    weights: Mapping[str, float]
    micro: MicroBatcher
    seed: int


@dataclass(frozen=True)
class Settings:
    """How a student is trained; see `Distill`."""

    temperature: float
    features: float
    anchor: float
    epochs: int
    warmup: float
    dtype: torch.dtype
    checkpointing: bool
    moments: torch.device | None
    """Where AdamW's moments are; None for the model's device."""


@dataclass
class Trial:
    """The training with one learning rate: the held-out losses before the first epoch and after each."""

    lr: float
    losses: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The epochs until the lowest loss."""
        return min(range(len(self.losses)), key=lambda epoch: self.losses[epoch])

    @property
    def better(self) -> bool:
        """Whether the training lowers the held-out loss."""
        return self.best > 0


class Training:
    """Trains the student from its present weights.

    A step uses one part of a batch of each task. Of several processes, the one that has it computes the gradients, so
    the steps are those of one process, up to rounding. The state after each epoch goes to `path`, if there is one, and
    a later process continues from it to the same weights.
    """

    def __init__(self, student: Student, settings: Settings) -> None:
        self.student, self.settings = student, settings
        own = dict(student.model.named_parameters())
        self.own = {name: own[name] for name in student.names}
        self.start = {name: parameter.detach().clone() for name, parameter in self.own.items()}
        self.fitted = {task: [part for batch in group for part in batch] for task, group in student.fitted.items()}
        self.numbers = {task: own_numbers([*map(len, group)]) for task, group in student.fitted.items()}
        self.spreads = {task: spread(parts) for task, parts in self.fitted.items()}
        self.steps = max(map(len, self.numbers.values()))

    def run(self, lr: float, path: Path | None = None) -> tuple[Trial, dict[str, Tensor]]:
        """Trains with a learning rate. Returns the trial and the best weights; the model has other ones afterwards."""
        device = self.settings.moments
        copies = {name: tensor.to(device or tensor.device, copy=True) for name, tensor in self.start.items()}
        adam = torch.optim.AdamW(copies.values(), lr=lr, weight_decay=0.0, foreach=False)
        trial, best = Trial(lr), self.start
        if path is not None and path.is_file():
            trial, best = self._restore(path, copies, adam)
        self._put(copies)
        if not trial.losses:
            trial.losses.append(self.held_out())
        epochs = range(len(trial.losses) - 1, self.settings.epochs)
        for epoch in track(epochs, f"train with lr {lr:g}"):
            for step in range(epoch * self.steps, (epoch + 1) * self.steps):
                self._step(step, lr, copies, adam)
            trial.losses.append(self.held_out())
            if trial.best == len(trial.losses) - 1:
                best = {name: tensor.detach().clone() for name, tensor in copies.items()}
            if path is not None and distributed.is_main():
                self._save(path, trial, best, copies, adam)
        return trial, best

    def held_out(self) -> float:
        """The mean of the tasks' losses over the held-out samples, by their weights."""
        total = 0.0
        with torch.no_grad():
            for task, examples in self.student.held.items():
                sums = torch.zeros(2, dtype=torch.float64)
                for example in (part for batch in examples for part in batch):
                    sums += torch.tensor(self.student.micro.run(partial(self._held_out, task, example)))
                found, rows = distributed.all_reduce(sums)
                total += self.student.weights[task] * float(found) / float(rows)
        return total / sum(self.student.weights.values())

    def _held_out(self, task: str, example: Example, samples: int) -> list[float]:
        """The sum of the losses of a batch, and its rows."""
        found = [(float(loss), rows) for loss, rows in self._losses(task, example, samples)]
        return [sum(loss for loss, _ in found), float(sum(rows for _, rows in found))]

    def _step(self, step: int, lr: float, copies: Mapping[str, Tensor], adam: torch.optim.AdamW) -> None:
        """One step of AdamW on a batch of each task."""
        total: dict[str, Tensor] = {}
        for task, numbers in self.numbers.items():
            order = shuffled(len(numbers), self.student.seed, task, step // len(numbers))
            number = numbers[order[step % len(numbers)]]
            if number is None:
                continue
            example, weight = self.fitted[task][number], self.student.weights[task] / sum(self.student.weights.values())
            with trained(self.own.values()), self._checkpointed():
                found = self.student.micro.run(partial(self._gradients, task, example), count=size(example.batch))
            for name, gradient in found.items():
                total[name] = total[name].add_(gradient, alpha=weight) if name in total else gradient.mul_(weight)
        for name, copy in copies.items():
            copy.grad = self._summed(name, total.pop(name, None)).to(copy.device)
        for group in adam.param_groups:
            group["lr"] = lr * self._schedule(step)
        adam.step()
        self._put(copies)

    def _summed(self, name: str, gradient: Tensor | None) -> Tensor:
        """The sum of the gradients of all processes for a tensor, with the anchor's."""
        own = self.own[name].detach()
        found = distributed.all_reduce(own.new_zeros(own.shape) if gradient is None else gradient)
        if self.settings.anchor:
            start = self.start[name]
            found += 2 * self.settings.anchor / start.square().sum().clamp(min=1e-12) * (own - start)
        return found

    def _gradients(self, task: str, example: Example, samples: int) -> dict[str, Tensor]:
        """The gradients of the mean loss of a batch, by tensor name."""
        total: dict[str, Tensor] = {}
        for loss, _ in self._losses(task, example, samples):
            found = torch.autograd.grad(loss / len(example.labels.kept), list(self.own.values()), allow_unused=True)
            for name, gradient in zip(self.own, found, strict=True):
                if gradient is not None:
                    total[name] = total[name].add_(gradient) if name in total else gradient
        return total

    def _losses(self, task: str, example: Example, samples: int) -> Iterator[tuple[Tensor, int]]:
        """The sums of the losses of the rows of each part of a batch, and the numbers of rows."""
        student, settings, start = self.student, self.settings, 0
        kind = next(student.model.parameters()).device.type
        for part in split(example.batch, samples):
            with torch.autocast(kind, settings.dtype, enabled=settings.dtype != torch.float32):
                found = outputs(student.family, student.model, part, student.heads[task])
            logits = found.logits.float()
            labels = example.labels.rows(slice(start, start := start + len(logits)))
            loss = labels.divergence(logits, settings.temperature).sum()
            if found.features is not None and settings.features and self.spreads[task]:
                error = labels.squared_error(found.features.float()).sum()
                loss = loss + settings.features / self.spreads[task] * error
            yield loss, len(logits)

    def _schedule(self, step: int) -> float:
        """The factor on the learning rate: it rises linearly, then falls by a cosine."""
        total = self.steps * self.settings.epochs
        rising = max(1, round(self.settings.warmup * total))
        falling = (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2
        return (step + 1) / rising if step < rising else falling

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        copy_into(self.student.model, {name: tensor.detach() for name, tensor in tensors.items()})

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Computes the activations of blocks again in the backward pass, if asked."""
        with ExitStack() as undo:
            for block in self.student.family.blocks(self.student.model) if self.settings.checkpointing else ():
                forward: Callable[..., Any] = block.module.forward
                block.module.forward = partial(checkpoint, forward, use_reentrant=False)
                undo.callback(setattr, block.module, "forward", forward)
            yield

    def _save(
        self,
        path: Path,
        trial: Trial,
        best: Mapping[str, Tensor],
        copies: Mapping[str, Tensor],
        adam: torch.optim.AdamW,
    ) -> None:
        """Writes the state after an epoch."""
        tensors = {f"best.{name}": tensor for name, tensor in best.items()}
        for name, copy in copies.items():
            tensors[f"own.{name}"] = copy.detach()
            tensors |= {f"{part}.{name}": adam.state[copy][part] for part in ("exp_avg", "exp_avg_sq")}
        step = int(next(iter(adam.state.values()))["step"])
        write_tensors(path, tensors, {"trial": asdict(trial), "step": step})

    def _restore(
        self, path: Path, copies: Mapping[str, Tensor], adam: torch.optim.AdamW
    ) -> tuple[Trial, dict[str, Tensor]]:
        """Reads the state after an epoch."""
        with opened(path) as (file, header):
            for name, copy in copies.items():
                copy.copy_(file.get_tensor(f"own.{name}"))
                parts = {part: file.get_tensor(f"{part}.{name}").to(copy) for part in ("exp_avg", "exp_avg_sq")}
                adam.state[copy] = {"step": torch.tensor(float(header["step"])), **parts}
            best = {name: file.get_tensor(f"best.{name}").to(copy) for name, copy in copies.items()}
            return Trial(**header["trial"]), best


def spread(examples: Sequence[Example]) -> float:
    """The variance of an expert's features over the samples of all processes, summed over their width; 0 without
    features."""
    rows = [example.labels.features.double() for example in examples if example.labels.features is not None]
    own = [(float(len(part)), part.sum(0), float(part.square().sum())) for part in rows]
    every = [part for parts in distributed.all_gather(own) for part in parts]
    if not every:
        return 0.0
    count, squares = sum(part[0] for part in every), sum(part[2] for part in every)
    total = torch.stack([part[1].cpu() for part in every]).sum(0)
    return max(0.0, (squares - float(total.square().sum()) / count) / count)
