"""Consensus merging: keeps the elements of a merge that matter for several tasks (Wang et al. 2024,
https://arxiv.org/abs/2405.07813, sections 4 and 5; https://github.com/nik-dim/tall_masks).

An element matters for a task if the task vector is larger there than its distance to the merged task vector, times a
factor (TALL mask). The paper chooses the factor by task on validation data; here it is a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece
from epmq_cli.merge.parameters import Choice, Number, Parameters, PerExpert, PerTensor
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.ties import Options, elected, majority_sign, sign_sum, trim_thresholds

if TYPE_CHECKING:
    from torch import Tensor

Merged = Callable[[Piece], "Tensor"]
"""The merged task vector of a piece, without its factor."""


def consensus(merged: Tensor, vectors: Mapping[str, Tensor], factors: Mapping[str, float], k: int) -> Tensor:
    """The elements of a merged task vector (n,) that matter for at least `k` tasks; zero elsewhere."""
    number = torch.zeros_like(merged)
    for task, vector in vectors.items():
        number += vector.abs() > factors[task] * (merged - vector).abs()
    return torch.where(number >= k, merged, 0)


@dataclass(frozen=True)
class ConsensusTaskArithmetic(Parameters):
    """`merge=consensus_ta`: the consensus on the sum of the task vectors.

    `scale`: factor on the merged task vector. `tall_mask_lambda`: the factor on the distance, also by task; a larger
    one keeps fewer elements. `k`: the tasks for which an element must matter, at most all; 0 is Task Arithmetic.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    scale: Annotated[Setting, PerTensor(0, 10)]
    tall_mask_lambda: Annotated[Setting, PerExpert(0, 100)]
    k: Annotated[int, Number(0, 1000, integer=True)]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model."""
        return self.rule(source, lambda piece: torch.stack(list(piece.task_vectors().values())).sum(0))

    def rule(self, source: MergeSource, merged: Merged) -> ElementwiseRule:
        """Base plus the consensus on a merged task vector."""
        scales, factors = source.setting(self.scale, 1.0), source.setting(self.tall_mask_lambda, 1.0)
        k = min(self.k, len(source.tasks))

        def merge(piece: Piece) -> Tensor:
            values = {task: factors.at(piece.name, task) for task in piece.experts}
            kept = consensus(merged(piece), piece.task_vectors(), values, k)
            return piece.base + scales.at(piece.name) * kept

        return ElementwiseRule(merge)


@dataclass(frozen=True)
class ConsensusTies(ConsensusTaskArithmetic):
    """`merge=consensus_ties`: the consensus on the merged task vector of TIES.

    `density` and `combine`: those of `merge=ties`. The other options are those of `merge=consensus_ta`.
    """

    density: Annotated[float, Number(0, 1, open_low=True)]
    combine: Annotated[str, Choice(("sum", "mean"))]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Reads all models three times, as TIES does."""
        thresholds = trim_thresholds(source, self.density)
        options = Options(thresholds, [1.0] * len(thresholds), mean=self.combine == "mean")
        majority = majority_sign(source, lambda piece: sign_sum(piece.base, [*piece.experts.values()], options))
        options = replace(options, majority=majority)

        def merged(piece: Piece) -> Tensor:
            return elected(torch.zeros_like(piece.base), list(piece.task_vectors().values()), options)

        return self.rule(source, merged)
