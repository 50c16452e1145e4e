"""Multi-SLERP: the experts' mean direction, times their mean length (Goddard 2025,
https://goddard.blog/posts/multislerp-wow-what-a-cool-idea).

The source moves from the normalized mean m of the unit tensors along the mean of their tangents at m. This mean is
always zero, because the tangents are taken at the mean itself, so the result is m times the mean length. If the unit
tensors cancel, m has no direction, and the result is the weighted average; mergekit raises an error for more than two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.average import check_sums
from epmq_cli.merge.gram import combination, gram
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Number, Parameters, Weight
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


def multislerp(tensors: Sequence[Tensor], weights: Sequence[float], eps: float) -> Tensor:
    """The weighted mean of the tensors' directions, times the weighted mean of their lengths."""
    products, shares = gram(tensors), torch.tensor(weights, dtype=torch.float64)
    lengths = products.diagonal().sqrt()
    factors = torch.where(lengths > 0, shares / lengths, 0.0)
    norm = (factors @ products @ factors).clamp(min=0).sqrt()
    if norm < eps:
        return combination(weights, tensors)
    return combination((factors * (shares @ lengths) / norm).tolist(), tensors)


@dataclass(frozen=True)
class Multislerp(Parameters):
    """`merge=multislerp`.

    `weights`: factors by task, a setting. `normalize_weights`: divides them by their sum. `eps`: the length of the mean
    of the unit tensors below which they cancel. `task_vectors`: merges the task vectors, as mergekit does if it is
    given a base, and not the experts.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    core: ClassVar[bool | str] = "task_vectors"

    weights: Annotated[Setting, Weight()]
    normalize_weights: bool
    eps: Annotated[float, Number(0, 1, open_low=True)]
    task_vectors: bool

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model. The rule holds one tensor of all experts."""
        weights = source.setting(self.weights, 1.0)
        if self.normalize_weights:
            check_sums(weights, source)

        def merge(name: str, base: Tensor, experts: Mapping[str, Tensor]) -> Tensor:
            own = [weights.at(name, task) for task in experts]
            shares = [weight / sum(own) for weight in own] if self.normalize_weights else own
            if self.task_vectors:
                return base + multislerp([experts[task] - base for task in experts], shares, self.eps)
            tensors = [experts[task] for task in experts]
            return tensors[0] if len(tensors) == 1 else multislerp(tensors, shares, self.eps)

        return TensorRule(merge)
