"""DARE: drops elements of the task vectors at random and rescales the rest (Yu et al. 2024,
https://arxiv.org/abs/2311.03099, section 3.2, equations 1 to 3).

Each expert, tensor and piece has its own random numbers (`Piece.generator`), so the result does not depend on threads,
devices or other tensors. The remaining elements are divided by the density, as in the paper, so that the expected value
of each element is that of the task vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece
from epmq_cli.merge.parameters import LARGEST_WEIGHT, Choice, Number, Parameters, PerExpert, PerTensor, Weight
from epmq_cli.merge.settings import Setting, weighted
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.task_arithmetic import add_task_vectors
from epmq_cli.merge.ties import Options, elected, majority_sign, sign_sum

if TYPE_CHECKING:
    from torch import Tensor


def dropped(vector: Tensor, density: float, generator: np.random.Generator) -> Tensor:
    """A task vector (n,), each element kept with probability `density` and divided by it, or else set to 0."""
    if density == 1:
        return vector
    mask = torch.from_numpy(generator.random(len(vector), dtype=np.float32)) < density
    return torch.where(mask, vector / density, torch.zeros(()))


@dataclass(frozen=True)
class DareLinear(Parameters):
    """`merge=dare_linear`: Task Arithmetic of the sparse task vectors.

    `density`: the probability that an element is kept, the paper's 1 - p, in (0, 1]; 1 is Task Arithmetic. `scale`:
    factor on the sum of the task vectors. `weights`: factors on the task vectors by task. `seed`: the seed of the
    random numbers.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    density: Annotated[Setting, PerExpert(0, 1, open_low=True)]
    scale: Annotated[Setting, PerTensor(0, 10)]
    weights: Annotated[Setting, Weight(-LARGEST_WEIGHT)]
    seed: Annotated[int, Number(0, (1 << 31) - 1, integer=True)]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model."""
        sparse, scales = self.sparse_vectors(source), source.setting(self.scale, 1.0)
        weights = source.setting(self.weights, 1.0)

        def merge(piece: Piece) -> Tensor:
            return add_task_vectors(piece.base, weighted(sparse(piece), weights, piece.name), scales.at(piece.name))

        return ElementwiseRule(merge)

    def sparse_vectors(self, source: MergeSource) -> Callable[[Piece], dict[str, Tensor]]:
        """For a piece, each task vector after the drop, by task."""
        densities = source.setting(self.density, 1.0)

        def vectors(piece: Piece) -> dict[str, Tensor]:
            return {
                task: dropped(vector, densities.at(piece.name, task), piece.generator(self.seed, task))
                for task, vector in piece.task_vectors().items()
            }

        return vectors


@dataclass(frozen=True)
class DareTies(DareLinear):
    """`merge=dare_ties`: drops elements at random where TIES trims them; then elects signs and merges the values that
    agree with them, as in TIES.

    `combine`: the `sum` of the agreeing values, or their `mean`, which divides by the sum of their weights. The other
    options are those of `merge=dare_linear`.
    """

    combine: Annotated[str, Choice(("sum", "mean"))]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Reads all models once, for the majority of signs, which decides where task vectors cancel."""
        sparse, scales = self.sparse_vectors(source), source.setting(self.scale, 1.0)
        weights = source.setting(self.weights, 1.0)

        def options(piece: Piece) -> Options:
            return Options([0.0] * len(piece.experts), [weights.at(piece.name, task) for task in piece.experts])

        def signs(piece: Piece) -> int:
            return sign_sum(torch.zeros_like(piece.base), [*sparse(piece).values()], options(piece))

        majority = majority_sign(source, signs)

        def merge(piece: Piece) -> Tensor:
            own = replace(options(piece), majority=majority, scale=scales.at(piece.name), mean=self.combine == "mean")
            return piece.base + elected(torch.zeros_like(piece.base), [*sparse(piece).values()], own)

        return ElementwiseRule(merge)
