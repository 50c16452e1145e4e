"""Measurements of the experts for merge methods, each on the calibration samples of its own task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from epmq_cli.calibrate.activations.batch_invariant import batch_invariant
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.input_sums import InputSums, merged_groups
from epmq_cli.calibrate.section_walk import SectionWalk
from epmq_cli.data.batching import Batch, Batches, device_of, size, split
from epmq_cli.data.held_out import Subset, members
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Mask
from epmq_cli.families.tasks.adapter import Head
from epmq_cli.merge.method import Group, Loss, MergeGroups, Weights
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.weights import copy_into
from epmq_cli.runtime import distributed

if TYPE_CHECKING:
    from torch import nn

CLASSES = 8  # classes per batched backward pass


@dataclass(frozen=True)
class ExpertMeasurements:
    """The `MergeData` of a run. Overwrites the merged tensors of `model` with those of the expert to measure.

    `heads`: by task, empty for families without heads. `micro`: halves the micro-batch on out-of-memory. `memory`: see
    `MergeData`. `folder`: of the files for activations beyond it.
    """

    model: nn.Module
    family: Family
    source: MergeSource
    batches: Batches
    heads: Mapping[str, Head]
    micro: MicroBatcher
    memory: int
    folder: Path | None = None

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return device_of(self.batches)

    def expert(self, task: str) -> nn.Module:
        """The model with the weights of a task's expert; valid until the next call."""
        copy_into(self.model, self.source.model(task))
        return self.model

    def put(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the model's weights, by name."""
        copy_into(self.model, tensors)

    def logits(self, task: str, batch: Batch) -> Tensor:
        """The logits (samples, classes) of a task's head, with the model's current weights."""
        return self._logits(self.heads[task], batch)

    def gradients(self, task: str, batch: Batch, loss: Loss) -> dict[str, Tensor]:
        """The gradients of the mean loss of a batch with respect to the merged tensors, by name, at the model's current
        weights. Tensors without a gradient are left out."""
        own = self._merged_parameters()
        head = {name: tensor.clone() for name, tensor in self.heads[task].items()}  # heads are inference tensors

        def of_parts(samples: int) -> dict[str, Tensor]:
            total, start = dict[str, Tensor](), 0
            for part in split(batch, samples):
                rows = slice(start, start := start + size(part))
                mean = loss(self._logits(head, part), rows).sum() / size(batch)
                found = torch.autograd.grad(mean, list(own.values()), allow_unused=True)
                for name, gradient in zip(own, found, strict=True):
                    if gradient is not None:
                        total[name] = total[name].add_(gradient) if name in total else gradient
            return total

        with trained(own.values()):
            return self.micro.run(of_parts, count=size(batch))

    def linear_groups(self) -> list[Group]:
        """The merged linears in the family's steps; those in one group read the same inputs."""
        return [names for names, _ in self._inputs()]

    def input_moments(self, task: str, linears: Sequence[str], subset: Subset = "all") -> dict[str, Tensor]:
        """E[x x'] of the inputs x of some linears in a task's expert, in float64, by name. See `MergeData`."""
        model = self.expert(task)
        masks = {name: mask for names, mask in self._inputs() for name in names if name in linears}
        with torch.inference_mode(), batch_invariant(model):
            measure = partial(self._moments, self.batches[task], masks, subset=subset)
            moments: dict[str, Tensor] = self.micro.run(measure)
        return moments

    def _moments(
        self, batches: Sequence[Batch], masks: Mapping[str, Mask], samples: int, subset: Subset = "all"
    ) -> dict[str, Tensor]:
        """The moments over some batches, `samples` samples at a time. `masks`: of the real tokens, by linear."""
        sums, forward = InputSums(masks), partial(self.family.features, self.model)
        for batch, chosen in zip(batches, members(subset, [size(batch) for batch in batches]), strict=True):
            sums.add(self.model, forward, split(batch, samples), chosen)
        return sums.means()

    def merge_sections(self, start: Weights, merge: MergeGroups) -> dict[str, Tensor]:
        """Gives the model the tensors of `start`, and then replaces its linears by what `merge` returns, section by
        section; returns them by tensor name. See `MergeData`.

        Hidden states take up to half of `memory`; further ones are in files.
        """
        model = self.model

        def walk(samples: int) -> dict[str, Tensor]:
            self.put(start())
            parts = {task: [split(batch, samples) for batch in group] for task, group in self.batches.items()}
            with ActivationStore(self.memory / 2, self.folder) as store, torch.inference_mode(), batch_invariant(model):
                return SectionWalk(model, self.family, self.source, merge, store, parts).run()

        merged: dict[str, Tensor] = self.micro.run(walk)
        return merged

    def squared_gradients(self, task: str, classes: int | None) -> dict[str, Tensor]:
        """The diagonal of the Fisher information of a task's expert, in float32, by tensor name.

        Samples go through the model one by one, because the gradients of each must be squared; the backward passes of
        its classes are batched.
        """
        self.expert(task)
        own = self._merged_parameters()
        sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in own.items()}
        head = {name: tensor.clone() for name, tensor in self.heads[task].items()}  # heads are inference tensors
        micro, count = gradient_batcher(self.micro), 0
        with trained(own.values()), sdpa_kernel(SDPBackend.MATH):  # other kernels have no batched backward pass
            for sample in (part for batch in self.batches[task] for part in split(batch, 1)):
                logits = partial(self._sample_logits, head, sample)
                for name, square in micro.run(partial(expected_squares, logits, own, classes)).items():
                    sums[name] += square
                count += 1
        samples = float(distributed.all_reduce(torch.tensor(count, dtype=torch.float64)))
        return {name: (distributed.all_reduce(total) / samples).float() for name, total in sums.items()}

    def _sample_logits(self, head: Head, sample: Batch) -> Tensor:
        """(classes,) of one sample."""
        return self._logits(head, sample)[0]

    def _logits(self, head: Head, batch: Batch) -> Tensor:
        """(samples, classes)."""
        return self.family.logits(self.model, self.family.features(self.model, batch), head)

    def _merged_parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters that are merged, by name."""
        names = set(self.source.names)
        return {name: parameter for name, parameter in self.model.named_parameters() if name in names}

    def _inputs(self) -> Iterator[tuple[Group, Mask]]:
        """The merged linears that read the same inputs, and the mask of the real tokens there."""
        merged = frozenset(self.source.names)
        for stack in self.family.stacks(self.model):
            for section in stack.sections:
                for group, step in merged_groups(section, merged):
                    yield group, stack.memory if step.memory else stack.mask


def expected_squares(
    logits: Callable[[], Tensor], parameters: Mapping[str, Tensor], classes: int | None, together: int
) -> dict[str, Tensor]:
    """Sum over c of p_c (d log p_c)^2 with respect to each parameter, for one sample.

    `logits()` returns the sample's logits (classes,); one logit is the mean of a Gaussian of variance 1. `classes`: the
    number of most likely classes that count, None for all. `together`: the number of classes per backward pass.
    """
    values = logits()
    outputs = values if len(values) == 1 else values.log_softmax(-1)
    chances = torch.ones_like(values) if len(values) == 1 else outputs.detach().exp()
    directions = chances.sqrt().diag()
    if classes is not None and classes < len(values):
        directions = directions[chances.topk(classes).indices]
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for rows in torch.split(directions, together):
        gradients_of = torch.autograd.grad(
            outputs, list(parameters.values()), rows, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        for total, gradients in zip(sums.values(), gradients_of, strict=True):
            for gradient in () if gradients is None else gradients:  # one by one, regardless of the batching
                total.addcmul_(gradient, gradient)
    return sums


def gradient_batcher(samples: MicroBatcher) -> MicroBatcher:
    """The number of classes that share a backward pass. The batcher of samples counts the halvings."""
    remedy = "use a device with more memory, or device=cpu"
    batcher = MicroBatcher(CLASSES, "the gradients of merge=fisher", remedy, retries=distributed.world_size() == 1)

    def count(_: int) -> None:
        samples.halved += 1
        samples.keep(samples.halved)

    batcher.keep = count
    return batcher


@contextmanager
def trained(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Enables gradients with respect to these parameters inside the context."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
