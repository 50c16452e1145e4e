"""RegMean: for each linear, the weight whose outputs are closest to those of the experts' weights on the experts' own
inputs (Jin et al. 2023, https://arxiv.org/abs/2212.09849, section 3.3, equation 2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.data.held_out import check_enough
from epmq_cli.errors import ModelError
from epmq_cli.merge.average import average
from epmq_cli.merge.method import Group, InputMoments, MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Number, Parameters
from epmq_cli.merge.source import MergeSource
from epmq_cli.quantize.linalg import damped_cholesky
from epmq_cli.runtime.console import say

if TYPE_CHECKING:
    from torch import Tensor

MATRICES = 4  # float64 matrices (in, in) per group of linears: moments, their sum, its copy and its factor; twice as
# many, and twice the rows, with fallback


def shrunk(G: Tensor, alpha: float) -> Tensor:
    """Moments (in, in) with their off-diagonal elements times alpha."""
    return alpha * G + (1 - alpha) * G.diagonal().diag()


@dataclass
class Regression:
    """The sums over experts i of one group of linears: `G` of G_i (in, in), and by linear the `mean` of W_i (out, in)
    and `GD` of G_i (W_i - mean)' (in, out).

    The solution is the mean plus a correction. So input columns that no expert uses keep the mean, experts with equal
    moments give the mean, and a single expert is returned unchanged.
    """

    G: Tensor
    mean: dict[str, Tensor]
    GD: dict[str, Tensor] = field(default_factory=dict)

    def add(self, G: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Adds an expert's moments and its weights by linear, all in float64."""
        self.G += G
        for name, W in weights.items():
            product = G @ (W - self.mean[name]).T
            self.GD[name] = self.GD[name] + product if name in self.GD else product

    def solve(self) -> dict[str, Tensor]:
        """The merged weights (out, in), by linear."""
        if not self.G.any():
            return dict(self.mean)
        factor = damped_cholesky(self.G, 0.0)
        if factor is None:
            names = ", ".join(self.mean)
            raise ModelError(f"the inputs of {names} hold a NaN or an infinity; train or fetch the models again")
        return {name: self.mean[name] + torch.cholesky_solve(GD, factor.lower).T for name, GD in self.GD.items()}

    def excess(self, name: str, W: Tensor) -> float:
        """The sum over experts of tr (W - W_i) G_i (W - W_i)' for a linear, less that of the mean."""
        C = W - self.mean[name]
        return float(((C @ self.G - 2 * self.GD[name].T) * C).sum())


@dataclass
class JudgedRegression:
    """Two regressions of one group of linears: `whole` on all samples, and `fitted` on those that are not held out.
    `held` has the sums over the samples that are held out."""

    whole: Regression
    fitted: Regression
    held: Regression

    def add(self, fitted: Tensor, held: Tensor, weights: Mapping[str, Tensor], alpha: float) -> None:
        """Adds an expert's moments of both kinds of samples, see `InputMoments`, and its weights by linear."""
        self.whole.add(shrunk(fitted + held, alpha), weights)
        self.fitted.add(shrunk(fitted, alpha), weights)
        outputs = sum(float(((W @ held) * W).sum()) for W in weights.values())
        self.held.add(held / outputs if outputs > 0 else torch.zeros_like(held), weights)

    def solve(self) -> tuple[dict[str, Tensor], set[str]]:
        """The merged weights (out, in), by linear, and the linears that keep the mean: if the solution on the samples
        that are not held out is further from the experts on those that are.

        The error of an expert is that of the outputs, relative to the outputs of the whole group.
        """
        merged = self.whole.solve()
        kept = {name for name, W in self.fitted.solve().items() if self.held.excess(name, W) > 0}
        return {name: self.whole.mean[name] if name in kept else W for name, W in merged.items()}, kept


@dataclass(frozen=True)
class RegMean(Parameters):
    """`merge=regmean`: `alpha` is the factor on the moments' off-diagonal elements, in [0, 1]. At 1 the regression is
    exact and may overfit the samples; at 0 only the magnitude of each input column counts. `fallback`: whether a linear
    keeps the mean of the experts where the regression is worse on samples that are held out; not part of the paper."""

    needs: ClassVar[frozenset[Need]] = frozenset({"batches"})

    alpha: Annotated[float, Number(0, 1)]
    fallback: bool = False

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Measures all experts once for each part of the linears whose moments fit into memory, and twice with
        `fallback`. Keeps the merged linears in memory."""
        assert data is not None
        solver = Solver.of(source, data, self.alpha, self.fallback, data.memory)
        merged = solver.solve(data.linear_groups(), data.input_moments)
        solver.report()
        return TensorRule(partial(linear_or_mean, merged))


@dataclass(frozen=True)
class Solver:
    """Merges groups of linears. `alpha`: see `shrunk`. `fallback`: see `RegMean`. `memory`: the bytes of the linears
    that are measured together. `kept`: whether the mean was kept, by linear, with `fallback`."""

    source: MergeSource
    alpha: float
    fallback: bool
    memory: int
    kept: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, source: MergeSource, data: MergeData, alpha: float, fallback: bool, memory: int) -> Solver:
        """A solver for the samples of `data`; DataError if they are too few for `fallback`."""
        for task in source.tasks if fallback else ():
            check_enough(task, data.batches[task], "merge.fallback=true")
        return cls(source, alpha, fallback, memory)

    def solve(self, groups: Sequence[Group], moments: InputMoments) -> dict[str, Tensor]:
        """The merged weights of groups of linears, by tensor name, in float32."""
        merged: dict[str, Tensor] = {}
        for part in parts(groups, self.source, self.memory // 2 if self.fallback else self.memory):
            merged |= self._judged(part, moments) if self.fallback else self._solved(part, moments)
        return {f"{name}.weight": W.float().cpu() for name, W in merged.items()}

    def report(self) -> None:
        """Says how many linears keep the mean, if any do."""
        if count := sum(self.kept.values()):
            say(
                f"merge.fallback: {count} of {len(self.kept)} linears keep the mean of the experts, which is closer to "
                "them on the samples that are held out"
            )

    def _solved(self, groups: Sequence[Group], moments: InputMoments) -> dict[str, Tensor]:
        """`solve` for groups that are measured together."""
        sums: dict[Group, Regression] = {}
        for task in self.source.tasks:
            own = moments(task, [group[0] for group in groups])
            for group in groups:
                G = shrunk(own.pop(group[0]), self.alpha)
                if group not in sums:
                    sums[group] = _empty(group, self.source, G)
                sums[group].add(G, self._weights(task, group, G))
        return {name: W for group in groups for name, W in sums.pop(group).solve().items()}

    def _judged(self, groups: Sequence[Group], moments: InputMoments) -> dict[str, Tensor]:
        """`_solved` with the mean where it is closer to the experts."""
        sums: dict[Group, JudgedRegression] = {}
        for task in self.source.tasks:
            fitted, held = (moments(task, [group[0] for group in groups], subset) for subset in ("fitted", "held"))
            for group in groups:
                G, H = fitted.pop(group[0]), held.pop(group[0])
                if group not in sums:
                    whole = _empty(group, self.source, G)
                    others = (Regression(torch.zeros_like(G), whole.mean) for _ in range(2))
                    sums[group] = JudgedRegression(whole, *others)
                sums[group].add(G, H, self._weights(task, group, G), self.alpha)
        merged: dict[str, Tensor] = {}
        for group in groups:
            own, kept = sums.pop(group).solve()
            merged |= own
            self.kept.update({name: name in kept for name in group})
        return merged

    def _weights(self, task: str, group: Group, like: Tensor) -> dict[str, Tensor]:
        """An expert's weights, by linear."""
        return {name: self.source.expert(task, f"{name}.weight").to(like) for name in group}


def parts(groups: Sequence[Group], source: MergeSource, memory: int) -> Iterator[list[Group]]:
    """Splits the groups into runs whose moments take at most `memory` bytes; each run has at least one group."""
    run, used = list[Group](), 0
    for group in groups:
        width = source.shape(f"{group[0]}.weight")[1]
        rows = sum(source.shape(f"{name}.weight")[0] for name in group)
        size = 8 * width * (MATRICES * width + 2 * rows)
        if run and used + size > memory:
            yield run
            run, used = [], 0
        run.append(group)
        used += size
    if run:
        yield run


def _empty(group: Group, source: MergeSource, G: Tensor) -> Regression:
    """The regression of a group of linears before any expert. `G`: moments of their inputs."""
    means: dict[str, Tensor] = {}
    for name in group:
        experts = source.experts(f"{name}.weight")
        means[name] = torch.stack([experts[task] for task in experts]).double().mean(0).to(G.device)
    return Regression(torch.zeros_like(G), means)


def linear_or_mean(merged: Mapping[str, Tensor], name: str, base: Tensor, experts: Mapping[str, Tensor]) -> Tensor:
    """The merged weight of a linear, and the mean of the experts for all other tensors."""
    return merged[name] if name in merged else average(list(experts.values()))
