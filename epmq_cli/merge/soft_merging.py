"""Merge coefficients that minimize the distance of the predictions from those of each task's expert, its soft labels,
as in SAMerging (https://arxiv.org/abs/2512.21288): the loss of distillation in place of AdaMerging's entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import torch

from epmq_cli.data.batching import Batch
from epmq_cli.merge.coefficients import LearnedCoefficients
from epmq_cli.merge.method import Loss, MergeData
from epmq_cli.merge.parameters import Number
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


def distance(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)) (samples,) of logits (samples, classes) at a temperature T.

    A single logit is the mean of a Gaussian of variance 1: half the squared difference.
    """
    if logits.shape[-1] == 1:
        return (logits - teacher).square().sum(-1) / 2
    log_p, log_q = (teacher / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class SoftMerging(LearnedCoefficients):
    """`merge=soft_merging`: the loss is the mean distance from the expert's soft labels. `temperature`: the divisor of
    the logits in front of the softmax."""

    temperature: Annotated[float, Number(0, 100, open_low=True)]

    def losses(
        self, source: MergeSource, data: MergeData, parts: Mapping[str, Sequence[Batch]]
    ) -> Mapping[str, Sequence[Loss]]:
        """Runs each expert once on the batches of its task, and keeps its logits."""
        losses: dict[str, list[Loss]] = {}
        for task, group in parts.items():
            data.put(source.model(task))
            with torch.no_grad():
                losses[task] = [partial(self._loss, data.logits(task, batch)) for batch in group]
        return losses

    def _loss(self, teacher: Tensor, logits: Tensor, rows: slice) -> Tensor:
        return distance(logits, teacher[rows], self.temperature)
