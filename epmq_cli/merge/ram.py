"""RAM: sums changes that one expert has alone, and averages those that several experts share (Reinforced Agent Merging
2026, https://arxiv.org/abs/2601.13572).

With `r` above 0 it is RAM+: an expert's own changes are multiplied by 1 + r min(rho, alpha), where rho is the number of
its shared changes for each of its own ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece, PieceReader
from epmq_cli.merge.parameters import Choice, Number, Parameters
from epmq_cli.merge.source import MergeSource
from epmq_cli.runtime.progress import track
from epmq_cli.runtime.threads import spread

if TYPE_CHECKING:
    from torch import Tensor


def changes(piece: Piece, epsilon: float) -> tuple[Tensor, Tensor]:
    """(experts, n) the task vectors, with zeros for changes of at most `epsilon`; (n,) how many experts have one."""
    vectors = torch.stack([*piece.task_vectors().values()])
    changed = vectors.abs() > epsilon
    return vectors * changed, changed.sum(0)


def ram(base: Tensor, vectors: Tensor, experts: Tensor, factors: Tensor) -> Tensor:
    """Base plus the merged changes. `factors` (experts,): those of changes that one expert has alone."""
    own = torch.where(experts == 1, factors[:, None], 1 / experts.clamp(min=1))
    return base + (own * vectors).sum(0)


@dataclass(frozen=True)
class Ram(Parameters):
    """`merge=ram`.

    `epsilon`: a change is larger than this. `r`: 0 for RAM, above 0 for RAM+; `alpha`: the largest rho that counts.
    `scope`: whether rho counts the changes of all tensors (`global`) or of each `tensor`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    epsilon: Annotated[float, Number(0, 1)]
    r: Annotated[float, Number(0, 10)]
    alpha: Annotated[float, Number(0, 10)]
    scope: Annotated[str, Choice(("global", "tensor"))]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model unless `r` is above 0, and then all of them once."""
        factors = dict.fromkeys(source.names, torch.ones(len(source.tasks)))
        if self.r:
            factors = self.own_factors(source)
        return ElementwiseRule(lambda piece: ram(piece.base, *changes(piece, self.epsilon), factors[piece.name]))

    def own_factors(self, source: MergeSource) -> dict[str, Tensor]:
        """(experts,) by tensor: the factors on changes that one expert has alone."""

        def count(reader: PieceReader) -> Tensor:
            vectors, experts = changes(reader(), self.epsilon)
            changed = vectors != 0
            return torch.stack([(changed & (experts > 1)).sum(1), (changed & (experts == 1)).sum(1)])

        names = track(source.names, "count the changes")
        counts = {name: torch.stack(spread(count, source.pieces(name))).sum(0) for name in names}
        if self.scope == "global":
            counts = dict.fromkeys(counts, torch.stack([*counts.values()]).sum(0))
        ratios = {name: shared / own.clamp(min=1) for name, (shared, own) in counts.items()}
        return {name: 1 + self.r * ratio.clamp(max=self.alpha) for name, ratio in ratios.items()}
