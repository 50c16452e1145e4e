"""DELLA: drops elements of the task vectors at random, small ones more often, and rescales the rest (Deep et al. 2024,
https://arxiv.org/abs/2406.11617, section 3, MagPrune).

In each row of a tensor, the probability to keep an element grows linearly with the rank of its magnitude, from density
- epsilon to density + epsilon; an element that is alone in its row has the density, where other implementations divide
0 by 0. What is kept is divided by its own probability, as in the authors' code, so that the expected value of each
element is that of the task vector; mergekit multiplies all by one factor. A tensor of one dimension is one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.merge.combine import Combine, addition, election
from epmq_cli.merge.gram import as_rows
from epmq_cli.merge.method import MergeData, Need, Piece, TensorRule
from epmq_cli.merge.parameters import LARGEST_WEIGHT, Choice, Number, Parameters, PerExpert, PerTensor, Weight
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import PIECE, MergeSource
from epmq_cli.runtime.threads import spread

if TYPE_CHECKING:
    from torch import Tensor


def probabilities(magnitudes: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """(rows, n) float32: the probability to keep each element, by the rank of its magnitude in its row; of equal
    magnitudes, the first one has the lower rank. `magnitudes`: in float32."""
    n = magnitudes.shape[1]
    steps = np.linspace(-1, 1, n) if n > 1 else np.zeros(1)
    keys = magnitudes.view(np.int32).astype(np.int64) << 32 | np.arange(n)  # magnitudes order like their bits
    keys.sort(axis=1)
    found = np.empty(magnitudes.shape, np.float32)
    np.put_along_axis(found, keys & 0xFFFFFFFF, (density + epsilon * steps).astype(np.float32)[None], axis=1)
    return found


def pruned(vector: Tensor, density: float, epsilon: float, generator: np.random.Generator) -> Tensor:
    """A task vector (rows, n), each element kept with its probability and divided by it, or else set to 0. A density of
    1 keeps all."""
    if density == 1:
        return vector
    keep = probabilities(vector.abs().numpy(), density, epsilon)
    mask = generator.random(keep.shape, dtype=np.float32) < keep
    return torch.where(torch.from_numpy(mask), vector / torch.from_numpy(keep), 0.0)


def check_probabilities(density: float, epsilon: float) -> None:
    """ConfigError unless the probabilities lie in (0, 1]. A density of 1 drops nothing, whatever epsilon is."""
    if density != 1 and not (density - epsilon > 0 and density + epsilon <= 1):
        raise ConfigError(
            f"merge.density - merge.epsilon must be above 0 and merge.density + merge.epsilon at most 1, got "
            f"{density} and {epsilon}; choose a smaller merge.epsilon"
        )


@dataclass(frozen=True)
class DellaLinear(Parameters):
    """`merge=della_linear`: Task Arithmetic of the sparse task vectors.

    `density`: the mean probability that an element is kept, a setting; 1 is Task Arithmetic. `epsilon`: the largest
    difference of a probability from it, a setting. `scale`: the paper's lambda, a factor on the sum of the task
    vectors. `weights`: factors on the task vectors by task. `seed`: the seed of the random numbers.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    density: Annotated[Setting, PerExpert(0, 1, open_low=True)]
    epsilon: Annotated[Setting, PerExpert(0, 0.5)]
    scale: Annotated[Setting, PerTensor(0, 10)]
    weights: Annotated[Setting, Weight(-LARGEST_WEIGHT)]
    seed: Annotated[int, Number(0, (1 << 31) - 1, integer=True)]

    def check(self, tasks: Sequence[str]) -> None:
        """ConfigError if density and epsilon are numbers that do not fit together."""
        super().check(tasks)
        if isinstance(self.density, (int, float)) and isinstance(self.epsilon, (int, float)):
            check_probabilities(self.density, self.epsilon)

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model. The rule holds one tensor of all experts.
        ConfigError if density and epsilon do not fit together at a tensor."""
        densities, epsilons = source.setting(self.density, 1.0), source.setting(self.epsilon, 0.0)
        weights, combine = source.setting(self.weights, 1.0), self.combination(source)
        for name in source.names:
            for task in source.tasks:
                check_probabilities(densities.at(name, task), epsilons.at(name, task))

        def part(piece: Piece, width: int) -> Tensor:
            name, vectors = piece.name, []
            for task, vector in piece.task_vectors().items():
                generator = piece.generator(self.seed, task)
                rows = vector.view(-1, width)
                vectors.append(pruned(rows, densities.at(name, task), epsilons.at(name, task), generator).flatten())
            return combine(name, piece.base, vectors, [weights.at(name, task) for task in piece.experts])

        def merge(name: str, base: Tensor, experts: Mapping[str, Tensor]) -> Tensor:
            rows, own = as_rows(base), {task: as_rows(experts[task]) for task in experts}
            width = max(1, rows.shape[1])
            step = max(1, PIECE // width)

            def work(start: int) -> Tensor:
                models = {task: tensor[start : start + step].flatten() for task, tensor in own.items()}
                return part(Piece(name, start * width, rows[start : start + step].flatten(), models), width)

            return torch.cat(spread(work, range(0, max(1, len(rows)), step))).view(base.shape)

        return TensorRule(merge)

    def combination(self, source: MergeSource) -> Combine:
        """Adds the sum of the task vectors."""
        return addition(source, self.scale)


@dataclass(frozen=True)
class Della(DellaLinear):
    """`merge=della`: elects signs and merges the values that agree with them, as in TIES; + where the task vectors
    cancel.

    `combine`: the `mean` of the agreeing values, which divides by the sum of their weights, or their `sum`. The other
    options are those of `merge=della_linear`.
    """

    combine: Annotated[str, Choice(("mean", "sum"))]

    def combination(self, source: MergeSource) -> Combine:
        """Adds the values that agree with the elected signs."""
        return election(source, self.scale, self.combine)
