"""Measurements of the experts for merge methods, each on the calibration samples of its own task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from epmq_cli.calibrate.activations.batch_invariant import batch_invariant
from epmq_cli.calibrate.moments import Products, real_tokens
from epmq_cli.data.batching import Batch, Batches, split
from epmq_cli.data.microbatch import MicroBatcher, joined
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Linears, Mask
from epmq_cli.families.tasks.adapter import Head
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.weights import copy_into
from epmq_cli.runtime import distributed

CLASSES = 8  # classes per batched backward pass


@dataclass(frozen=True)
class ExpertMeasurements:
    """The `MergeData` of a run. Overwrites the merged tensors of `model` with those of the expert to measure.

    `heads`: by task, empty for families without heads. `micro`: halves the micro-batch on out-of-memory. `memory`: see
    `MergeData`.
    """

    model: nn.Module
    family: Family
    source: MergeSource
    batches: Batches
    heads: Mapping[str, Head]
    micro: MicroBatcher
    memory: int

    def expert(self, task: str) -> nn.Module:
        """The model with the weights of a task's expert; valid until the next call."""
        copy_into(self.model, self.source.model(task))
        return self.model

    def logits(self, task: str, batch: Batch) -> Tensor:
        """The logits (samples, classes) of a task's head, with the model's current weights."""
        return self.family.logits(self.model, self.family.features(self.model, batch), self.heads[task])

    def linear_groups(self) -> list[tuple[str, ...]]:
        """The merged linears in the family's steps; those in one group read the same inputs."""
        return [names for names, _ in self._inputs()]

    def input_moments(self, task: str, linears: Sequence[str]) -> dict[str, Tensor]:
        """E[x x'] of the inputs x of some linears in a task's expert, in float64, by name."""
        model = self.expert(task)
        masks = {name: mask for names, mask in self._inputs() for name in names if name in linears}
        with torch.inference_mode(), batch_invariant(model):
            moments: dict[str, Tensor] = self.micro.run(partial(self._moments, self.batches[task], masks))
        return moments

    def _moments(self, batches: Sequence[Batch], masks: Mapping[str, Mask], samples: int) -> dict[str, Tensor]:
        """The moments over some batches, `samples` samples at a time. `masks`: of the real tokens, by linear."""
        sums = InputSums(masks)
        for batch in batches:
            sums.add(self.model, partial(self.family.features, self.model), split(batch, samples))
        return sums.means()

    def squared_gradients(self, task: str, classes: int | None) -> dict[str, Tensor]:
        """The diagonal of the Fisher information of a task's expert, in float32, by tensor name.

        Samples go through the model one by one, because the gradients of each must be squared; the backward passes of
        its classes are batched.
        """
        model = self.expert(task)
        names = set(self.source.names)
        own = {name: parameter for name, parameter in model.named_parameters() if name in names}
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
        return self.family.logits(self.model, self.family.features(self.model, sample), head)[0]

    def _inputs(self) -> Iterator[tuple[tuple[str, ...], Mask]]:
        """The merged linears that read the same inputs, and the mask of the real tokens there."""
        merged = set(self.source.names)
        for stack in self.family.stacks(self.model):
            for section in stack.sections:
                for step in section.steps:
                    if isinstance(step, Linears):
                        names = tuple(section.name(name) for name in step.names)
                        group = tuple(name for name in names if f"{name}.weight" in merged)
                        if group:
                            yield group, stack.memory if step.memory else stack.mask


class InputSums:
    """Sums of x x' over the inputs x of linears. `masks`: of the real tokens, by linear.

    The rows of a whole batch are multiplied at once, regardless of the micro-batch size, so that smaller micro-batches
    give the same bytes.
    """

    def __init__(self, masks: Mapping[str, Mask]) -> None:
        self._masks = masks
        self._products, self._tokens = {name: Products(distributed) for name in masks}, dict.fromkeys(masks, 0)

    def add(self, model: nn.Module, forward: Callable[[Batch], object], parts: Sequence[Batch]) -> None:
        """Adds the inputs from the forward passes of the parts of a batch."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self._masks}

        def take(name: str, inputs: Tensor) -> None:
            mask = self._masks[name](parts[len(rows[name])]) if inputs.ndim > 2 else None
            rows[name].append(real_tokens(inputs, mask))
            if len(rows[name]) == len(parts):
                self._tokens[name] += sum(map(len, rows[name]))
                self._products[name].add_square(joined(rows.pop(name)))

        for part in parts:
            with first_inputs(model, self._masks, take):
                forward(part)

    def means(self) -> dict[str, Tensor]:
        """E[x x'] (in, in) over the tokens of all processes, by linear; call it once."""
        return {name: self._mean(name) for name in self._masks}

    def _mean(self, name: str) -> Tensor:
        rows = self._products.pop(name).square_rows()
        tokens = distributed.all_reduce(torch.tensor(self._tokens[name], dtype=torch.float64))
        return distributed.all_gather_rows(rows, rows.shape[1]) / float(tokens)


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


@contextmanager
def first_inputs(model: nn.Module, names: Collection[str], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the context, passes the name and input of each module's first call to `add`. Later calls, such as those of
    DeBERTa's keys for positions, do not count."""
    waiting = set(names)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name in waiting:
                waiting.discard(name)
                add(name, args[0])

        return take

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
