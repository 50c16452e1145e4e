"""RegMean++: RegMean layer by layer, where the inputs of a layer come from the layers that are merged already
(Nguyen et al. 2025, https://arxiv.org/abs/2508.03121)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

from epmq_cli.merge.average import average
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Number, Parameters
from epmq_cli.merge.regmean import Solver, linear_or_mean
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RegMeanPP(Parameters):
    """`merge=regmean_pp`: `alpha` is the factor on the moments' off-diagonal elements, and `fallback` whether linears
    may keep the mean, as in `merge=regmean`."""

    needs: ClassVar[frozenset[Need]] = frozenset({"batches"})

    alpha: Annotated[float, Number(0, 1)]
    fallback: bool = False

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Runs each block once for each expert, or twice with `fallback`, and once merged, more often if its moments
        take more than half of `data.memory`. Keeps the merged linears in memory, and up to the other half of the
        samples' hidden states."""
        assert data is not None
        solver = Solver.of(source, data, self.alpha, self.fallback, data.memory // 2)

        def means() -> Iterator[tuple[str, Tensor]]:
            return ((name, average([source.expert(task, name) for task in source.tasks])) for name in source.names)

        merged = data.merge_sections(means, solver.solve)
        solver.report()
        return TensorRule(partial(linear_or_mean, merged))
