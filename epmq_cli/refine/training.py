"""Trains a student on its experts' outputs, epoch by epoch, and keeps the weights with the lowest held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from epmq_cli.calibrate.merge_data import trained
from epmq_cli.data.batch_order import own_numbers, shuffled
from epmq_cli.data.batching import Batch, size, split
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.data.views import view
from epmq_cli.families.family import Family
from epmq_cli.families.tasks.adapter import Head
from epmq_cli.models.fast_linears import fast_linears
from epmq_cli.models.weights import copy_into
from epmq_cli.refine.hidden_states import chosen
from epmq_cli.refine.muon import Muon
from epmq_cli.refine.soft_labels import SoftLabels, outputs
from epmq_cli.refine.trained import Trained
from epmq_cli.refine.trial import Optimizers, Trial, restore, save
from epmq_cli.runtime import distributed
from epmq_cli.runtime.progress import track

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Example:
    """A batch of a task, and the outputs of its expert for the batch and its views."""

    batch: Batch
    labels: Sequence[SoftLabels]
    seed: int

    def view(self, number: int) -> tuple[Batch, SoftLabels]:
        """A changed copy of the batch with the expert's outputs; 0 is the batch itself."""
        return view(self.batch, self.seed, number), self.labels[number]


Examples = Mapping[str, Sequence[Sequence[Example]]]
"""By task, the parts of each batch; with several processes, those of this one."""


@dataclass(frozen=True)
class Student:
    """The model to train and the data: examples to fit and to hold out, heads, and weights of the tasks' losses."""

    model: nn.Module
    family: Family
    names: Sequence[str]
    """The tensors to train."""
    trained: Trained
    fitted: Examples
    held: Examples
    heads: Mapping[str, Head]
    weights: Mapping[str, float]
    micro: MicroBatcher
    seed: int


@dataclass(frozen=True)
class Settings:
    """How a student is trained; see `Distill`."""

    optimizer: str
    temperature: float
    features: float
    hidden: float
    hidden_blocks: Sequence[int] | None
    anchor: float
    epochs: int
    patience: int
    warmup: float
    dtype: torch.dtype
    checkpointing: bool
    moments: torch.device | None
    """Where the optimizer's moments are; None for the model's device."""


@dataclass(frozen=True)
class Part:
    """Some samples of a batch: their rows' losses, and whether student and expert agree on their classes; (rows,)."""

    losses: Tensor
    agreements: Tensor


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
        self.start = {name: student.trained.start(name, tensor.detach()) for name, tensor in self.own.items()}
        self.fitted = {task: [part for batch in group for part in batch] for task, group in student.fitted.items()}
        self.numbers = {task: own_numbers([*map(len, group)]) for task, group in student.fitted.items()}
        self.blocks = chosen(settings.hidden_blocks, student.family, student.model) if settings.hidden else ()
        self.spreads = {
            task: spread([part.labels[0].features for part in parts]) for task, parts in self.fitted.items()
        }
        self.hidden_spreads = {
            task: [spread([part.labels[0].hidden[place] for part in parts]) for place in range(len(self.blocks))]
            for task, parts in self.fitted.items()
        }
        self.steps = max(map(len, self.numbers.values()))

    def try_rates(self, rates: Sequence[float], folder: Path | None) -> tuple[list[Trial], dict[str, Tensor]]:
        """Trains with each learning rate. Returns the trials, and the numbers of the one with the lowest held-out loss;
        none if no rate lowers it. `folder`: for the state of each trial."""
        trials, best, lowest = list[Trial](), dict[str, Tensor](), float("inf")
        for number, lr in enumerate(rates):
            trial, found = self.run(lr, folder and folder / f"trial-{number}.safetensors")
            trials.append(trial)
            if trial.better and trial.losses[trial.best] < lowest:
                best, lowest = found, trial.losses[trial.best]
        return trials, best

    def run(self, lr: float, path: Path | None = None) -> tuple[Trial, dict[str, Tensor]]:
        """Trains with a learning rate. Returns the trial and the best numbers; the model has other ones afterwards."""
        device = self.settings.moments
        copies = {name: tensor.to(device or tensor.device, copy=True) for name, tensor in self.start.items()}
        optimizers = self._optimizers(copies)
        trial, best, weights = Trial(lr), self.start, self.student.weights
        if path is not None and path.is_file():
            trial, best = restore(path, copies, optimizers)
        self._put(self.start)
        first = self._held_out()
        if not trial.losses:
            trial.add(first, first, weights)
        self._put(copies)
        epochs = range(len(trial.losses) - 1, self.settings.epochs)
        for epoch in track(epochs, f"train with lr {lr:g}"):
            if trial.idle >= self.settings.patience:
                break
            for step in range(epoch * self.steps, (epoch + 1) * self.steps):
                self._step(step, lr, copies, optimizers)
            if not trial.add(self._held_out(), first, weights):
                break
            if trial.best == len(trial.losses) - 1:
                best = {name: tensor.detach().clone() for name, tensor in copies.items()}
            if path is not None and distributed.is_main():
                save(path, trial, best, copies, optimizers)
        return trial, best

    def _optimizers(self, copies: Mapping[str, Tensor]) -> Optimizers:
        """Muon for the matrices of the blocks' linears, if asked, and AdamW for the rest."""
        own = set[str]()
        if self.settings.optimizer == "muon" and self.student.trained.whole:
            own = matrices(self.student.family, self.student.model)
        muon = [tensor for name, tensor in copies.items() if name in own]
        adam = [tensor for name, tensor in copies.items() if name not in own]
        found: Optimizers = []
        if muon:
            found.append(Muon(muon))
        if adam:
            found.append(torch.optim.AdamW(adam, weight_decay=0.0, foreach=False))
        return found

    def _held_out(self) -> dict[str, Tensor]:
        """The losses and agreements of the held-out rows of this process, (rows, 2) by task."""

        def rows(task: str, batch: Batch, labels: SoftLabels, samples: int) -> Tensor:
            parts = self._parts(task, batch, labels, samples)
            return torch.cat([torch.stack([part.losses, part.agreements], 1).double() for part in parts])

        found = {}
        with torch.no_grad(), fast_linears(self.student.model):
            for task, examples in self.student.held.items():
                every = [part.view(0) for batch in examples for part in batch]
                own = [self.student.micro.run(partial(rows, task, *example)).cpu() for example in every]
                found[task] = torch.cat([torch.zeros(0, 2, dtype=torch.float64), *own])
        return found

    def _step(self, step: int, lr: float, copies: Mapping[str, Tensor], optimizers: Optimizers) -> None:
        """One step of the optimizers on a batch of each task; each epoch takes other views of them."""
        total: dict[str, Tensor] = {}
        for task, numbers in self.numbers.items():
            epoch, place = divmod(step, len(numbers))
            number = numbers[shuffled(len(numbers), self.student.seed, task, epoch)[place]]
            if number is None:
                continue
            weight, example = self.student.weights[task] / sum(self.student.weights.values()), self.fitted[task][number]
            batch, labels = example.view(epoch % len(example.labels))
            with trained(self.own.values()), fast_linears(self.student.model), self._checkpointed():
                found = self.student.micro.run(partial(self._gradients, task, batch, labels), count=size(batch))
            for name, gradient in found.items():
                total[name] = total[name].add_(gradient, alpha=weight) if name in total else gradient.mul_(weight)
        for name, copy in copies.items():
            copy.grad = self._summed(name, total.pop(name, None), copy).to(copy.device)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * self._schedule(step)
            optimizer.step()
        self._put(copies)

    def _summed(self, name: str, gradient: Tensor | None, numbers: Tensor) -> Tensor:
        """The sum of the gradients of all processes for the numbers of a tensor, with the anchor's."""
        own = self.own[name].detach()
        found = distributed.all_reduce(own.new_zeros(own.shape) if gradient is None else gradient)
        found = self.student.trained.gradient(name, found, numbers.detach())
        if self.settings.anchor:
            start = self.start[name]
            distance = numbers.detach().to(start.device) - start
            found = found + 2 * self.settings.anchor / start.square().sum().clamp(min=1e-12) * distance
        return found

    def _gradients(self, task: str, batch: Batch, labels: SoftLabels, samples: int) -> dict[str, Tensor]:
        """The gradients of the mean loss of a batch, by tensor name."""
        total: dict[str, Tensor] = {}
        for part in self._parts(task, batch, labels, samples):
            found = torch.autograd.grad(
                part.losses.sum() / len(labels.kept), list(self.own.values()), allow_unused=True
            )
            for name, gradient in zip(self.own, found, strict=True):
                if gradient is not None:
                    total[name] = total[name].add_(gradient) if name in total else gradient
        return total

    def _parts(self, task: str, batch: Batch, labels: SoftLabels, samples: int) -> Iterator[Part]:
        """The losses of a batch, some samples at a time."""
        student, settings, start, starts = self.student, self.settings, 0, [0] * len(self.blocks)
        kind = next(student.model.parameters()).device.type
        for part in split(batch, samples):
            with torch.autocast(kind, settings.dtype, enabled=settings.dtype != torch.float32):
                found = outputs(student.family, student.model, part, student.heads[task], self.blocks)
            logits = found.logits.float()
            own = labels.rows(slice(start, start := start + len(logits)))
            losses = own.divergence(logits, settings.temperature)
            if found.features is not None and settings.features and self.spreads[task]:
                losses = losses + settings.features / self.spreads[task] * own.squared_error(found.features.float())
            if self.blocks:
                error = labels.hidden_error([x.float() for x in found.hidden], starts, self.hidden_spreads[task])
                losses = losses + settings.hidden * len(labels.kept) / len(logits) * error
                starts = [begin + len(x) for begin, x in zip(starts, found.hidden, strict=True)]
            yield Part(losses, own.agreements(logits.detach()))

    def _schedule(self, step: int) -> float:
        """The factor on the learning rate: it rises linearly, then falls by a cosine."""
        total = self.steps * self.settings.epochs
        rising = max(1, round(self.settings.warmup * total))
        falling = (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2
        return (step + 1) / rising if step < rising else falling

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        trained = self.student.trained
        copy_into(self.student.model, ((name, trained.tensor(name, own.detach())) for name, own in tensors.items()))

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Computes the activations of blocks again in the backward pass, if asked."""
        with ExitStack() as undo:
            for block in self.student.family.blocks(self.student.model) if self.settings.checkpointing else ():
                forward: Callable[..., Any] = block.module.forward
                block.module.forward = partial(checkpoint, forward, use_reentrant=False)
                undo.callback(setattr, block.module, "forward", forward)
            yield


def matrices(family: Family, model: nn.Module) -> set[str]:
    """The names of the weights of the blocks' linears."""
    return {block.name(f"{name}.weight") for block in family.blocks(model) for name in block.linears}


def spread(parts: Sequence[Tensor | None]) -> float:
    """The variance of an expert's features or hidden states over the rows of all processes, summed over their width; 0
    without any."""
    rows = [part.double() for part in parts if part is not None]
    own = [(float(len(part)), part.sum(0), float(part.square().sum())) for part in rows]
    every = [part for parts in distributed.all_gather(own) for part in parts]
    if not every:
        return 0.0
    count, squares = sum(part[0] for part in every), sum(part[2] for part in every)
    total = torch.stack([part[1].cpu() for part in every]).sum(0)
    return max(0.0, (squares - float(total.square().sum()) / count) / count)
