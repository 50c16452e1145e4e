"""AdaMerging: merge coefficients that minimize the entropy of the predictions (Yang et al. 2024,
https://arxiv.org/abs/2310.02575, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from epmq_cli.data.batching import Batch
from epmq_cli.merge.coefficients import LearnedCoefficients
from epmq_cli.merge.method import Loss, MergeData
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """The entropy (samples,) of the softmax of logits (samples, classes); 0 for a single logit."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@dataclass(frozen=True)
class AdaMerging(LearnedCoefficients):
    """`merge=adamerging`: the loss is the mean entropy. A head with one output has no entropy and does not count."""

    def losses(
        self, source: MergeSource, data: MergeData, parts: Mapping[str, Sequence[Batch]]
    ) -> Mapping[str, Sequence[Loss]]:
        """The entropy, for every batch."""
        return {task: [lambda logits, rows: entropy(logits)] * len(group) for task, group in parts.items()}
