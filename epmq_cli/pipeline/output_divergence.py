"""How far a model's outputs are from those that it had before, on samples that are held out elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from epmq_cli.data.batching import Batches, split
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
    held, top = filled(hold_out(batches)[1]), TOP if family.heads == "none" else None

    def own(task: ScoredTask) -> Iterator[Outputs]:
        for batch in held[task.name]:
            for part in split(batch, samples):
                yield Outputs(outputs(family, model, part, task.head).logits.double(), None)

    kept = {task.name: [SoftLabels.of(out, 1.0, top) for out in own(task)] for task in tasks}

    def divergence() -> float:
        total = 0.0
        for task in tasks:
            sums = torch.zeros(2, dtype=torch.float64)
            for out, labels in zip(own(task), kept[task.name], strict=True):
                rows = labels.divergence(out.logits, 1.0)
                sums += torch.tensor([float(rows.sum()), float(len(rows))], dtype=torch.float64)
            divergence, rows_of_all = distributed.all_reduce(sums).tolist()
            total += divergence / rows_of_all
        return total / len(tasks)

    return divergence
