"""Model Breadcrumbs: removes the largest and the smallest changes of each task vector (Davari and Belilovsky 2023,
https://arxiv.org/abs/2312.06795, section 3), then adds them, or elects signs as TIES does.

The density counts, so fewer large changes are removed if it leaves no room for them, and at least one element is kept.
Equal magnitudes are all kept or all removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch

from epmq_cli.merge.combine import Combine, addition, election
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import LARGEST_WEIGHT, Choice, Parameters, PerExpert, PerTensor, Weight
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource
from epmq_cli.runtime.threads import spread

if TYPE_CHECKING:
    from torch import Tensor


def without_extremes(vector: Tensor, density: float, gamma: float) -> Tensor:
    """A task vector (rows, n), with zeros for the int(gamma n) largest magnitudes in each row, and for the smallest
    ones, so that int(density n) are kept."""
    magnitudes, n = vector.abs(), vector.shape[1]
    kept = max(1, int(density * n))
    top = min(int(gamma * n), n - kept)
    first = n - top - kept
    if first + top == 0:
        return vector
    ends = [first, first + kept - 1]
    low, high = torch.from_numpy(np.partition(magnitudes.numpy(), ends, axis=1)[:, ends]).unbind(1)
    mask = (magnitudes >= low[:, None]) & (magnitudes <= high[:, None])
    return torch.where(mask, vector, 0.0)


@dataclass(frozen=True)
class Breadcrumbs(Parameters):
    """`merge=breadcrumbs`: Task Arithmetic of the task vectors without their extremes.

    `density`: the part of the elements that is kept, a setting. `gamma`: the part of the largest ones that is removed,
    a setting. `scale`: factor on the sum of the task vectors. `weights`: factors on the task vectors by task. `scope`:
    `tensor` counts over each tensor, `row` along its last dimension, as the authors' code does.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    density: Annotated[Setting, PerExpert(0, 1, open_low=True)]
    gamma: Annotated[Setting, PerExpert(0, 1)]
    scale: Annotated[Setting, PerTensor(0, 10)]
    weights: Annotated[Setting, Weight(-LARGEST_WEIGHT)]
    scope: Annotated[str, Choice(("tensor", "row"))]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model. The rule holds one tensor of all experts, up to three times."""
        densities, gammas = source.setting(self.density, 1.0), source.setting(self.gamma, 0.0)
        weights, combine = source.setting(self.weights, 1.0), self.combination(source)

        def merge(name: str, base: Tensor, experts: Mapping[str, Tensor]) -> Tensor:
            width = base.shape[-1] if self.scope == "row" and base.ndim else base.numel()

            def sparse(task: str) -> Tensor:
                vector = (experts[task] - base).reshape(-1, max(1, width))
                return without_extremes(vector, densities.at(name, task), gammas.at(name, task)).flatten()

            own = [weights.at(name, task) for task in experts]
            return combine(name, base.flatten(), spread(sparse, experts), own).view(base.shape)

        return TensorRule(merge)

    def combination(self, source: MergeSource) -> Combine:
        """Adds the sum of the task vectors."""
        return addition(source, self.scale)


@dataclass(frozen=True)
class BreadcrumbsTies(Breadcrumbs):
    """`merge=breadcrumbs_ties`: elects signs and merges the values that agree with them, as in TIES; + where the task
    vectors cancel.

    `combine`: the `sum` of the agreeing values, or their `mean`, which divides by the sum of their weights. The other
    options are those of `merge=breadcrumbs`.
    """

    combine: Annotated[str, Choice(("sum", "mean"))]

    def combination(self, source: MergeSource) -> Combine:
        """Adds the values that agree with the elected signs."""
        return election(source, self.scale, self.combine)
