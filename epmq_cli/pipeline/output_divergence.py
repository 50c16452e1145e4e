"""How far a model's outputs are from those that it had before, on samples that are held out elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from epmq_cli.data.batching import Batch, Batches, split
from epmq_cli.data.held_out import check_enough, filled, hold_out
from epmq_cli.evaluate.score import ScoredTask
from epmq_cli.families.family import Family
from epmq_cli.quantize.mixed_precision import MixedPrecision
from epmq_cli.refine.soft_labels import Outputs, SoftLabels, outputs
from epmq_cli.runtime import distributed

TOP = 64  # classes of each token that are kept of the outputs of language models


def with_divergence(
    mixed: MixedPrecision, family: Family, model: nn.Module, batches: Batches, tasks: Sequence[ScoredTask], samples: int
) -> MixedPrecision:
    """A mix that can measure the divergence of the model's outputs, if it needs that. DataError if no sample of a task
    would be held out. `samples`: see `keep_outputs`."""
    if mixed.sensitivity != "divergence":
        return mixed
    for task, group in batches.items():
        check_enough(task, group, "quant.sensitivity=divergence")
    return replace(mixed, divergence=partial(keep_outputs, family, model, batches, tasks, samples))


def keep_outputs(
    family: Family, model: nn.Module, batches: Batches, tasks: Sequence[ScoredTask], samples: int
) -> Callable[[], float]:
    """Keeps the model's outputs on a fifth of the batches. Returns a function that measures the KL divergence of its
    later outputs from them, the mean of the tasks. `samples`: how many run through the model at a time."""
    held = filled(hold_out(batches)[1])

    def own(task: ScoredTask) -> Iterator[Outputs]:
        return outputs_of(family, model, task, held[task.name], samples)

    kept = {task.name: soft_labels(family, own(task), 1.0) for task in tasks}
    return lambda: sum(mean_divergence(own(task), kept[task.name], 1.0) for task in tasks) / len(tasks)


def outputs_of(
    family: Family, model: nn.Module, task: ScoredTask, batches: Sequence[Batch], samples: int
) -> Iterator[Outputs]:
    """The logits of batches in float64, `samples` samples at a time."""
    for batch in batches:
        for part in split(batch, samples):
            logits = outputs(family, model, part, task.head).logits
            yield Outputs(logits.double(), None, numbers=family.numbers)


def soft_labels(family: Family, found: Iterator[Outputs], temperature: float) -> list[SoftLabels]:
    """The outputs as soft labels; of language models the largest classes of each token."""
    return [SoftLabels.of(out, temperature, TOP if family.vocabulary else None) for out in found]


def mean_divergence(found: Iterator[Outputs], kept: Sequence[SoftLabels], temperature: float) -> float:
    """The mean divergence of outputs from soft labels over the rows of all processes."""
    sums = torch.zeros(2, dtype=torch.float64)
    for out, labels in zip(found, kept, strict=True):
        rows = labels.divergence(out.logits, temperature)
        sums += torch.tensor([float(rows.sum()), float(len(rows))], dtype=torch.float64)
    divergence, count = distributed.all_reduce(sums).tolist()
    return float(divergence / count)
