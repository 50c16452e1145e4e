"""RegMean: for each linear, the weight whose outputs are closest to those of the experts' weights on the experts' own
inputs (Jin et al. 2023, https://arxiv.org/abs/2212.09849, section 3.3, equation 2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from epmq_cli.errors import ModelError
from epmq_cli.merge.average import average
from epmq_cli.merge.method import Group, InputMoments, MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Number, Parameters
from epmq_cli.merge.source import MergeSource
from epmq_cli.quantize.linalg import damped_cholesky

MATRICES = 4  # float64 matrices (in, in) per group of linears: moments, their sum, its copy and its factor


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


@dataclass(frozen=True)
class RegMean(Parameters):
    """`merge=regmean`: `alpha` is the factor on the moments' off-diagonal elements, in [0, 1]. At 1 the regression is
    exact and may overfit the samples; at 0 only the magnitude of each input column counts."""

    needs: ClassVar[frozenset[Need]] = frozenset({"batches"})

    alpha: Annotated[float, Number(0, 1)]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Measures all experts once for each part of the linears whose moments fit into memory. Keeps the merged
        linears in memory."""
        assert data is not None
        merged = solved(data.linear_groups(), data.input_moments, source, self.alpha, data.memory)
        return TensorRule(partial(linear_or_mean, merged))


def solved(
    groups: Sequence[Group], moments: InputMoments, source: MergeSource, alpha: float, memory: int
) -> dict[str, Tensor]:
    """The merged weights of groups of linears, by tensor name, in float32. `alpha`: see `shrunk`. `memory`: the bytes
    of the linears that are measured together."""
    merged: dict[str, Tensor] = {}
    for part in parts(groups, source, memory):
        merged |= _solved(part, moments, source, alpha)
    return merged


def _solved(groups: Sequence[Group], moments: InputMoments, source: MergeSource, alpha: float) -> dict[str, Tensor]:
    """`solved` for groups that are measured together."""
    sums: dict[Group, Regression] = {}
    for task in source.tasks:
        own = moments(task, [group[0] for group in groups])
        for group in groups:
            G = shrunk(own.pop(group[0]), alpha)
            if group not in sums:
                sums[group] = Regression(torch.zeros_like(G), _means(group, source, G.device))
            sums[group].add(G, {name: source.expert(task, f"{name}.weight").to(G) for name in group})
    merged = {name: W for group in groups for name, W in sums.pop(group).solve().items()}
    return {f"{name}.weight": W.float().cpu() for name, W in merged.items()}


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


def _means(group: Group, source: MergeSource, device: torch.device) -> dict[str, Tensor]:
    """The means of the experts' weights, by linear, in float64."""
    total: dict[str, Tensor] = {}
    for name in group:
        experts = source.experts(f"{name}.weight")
        total[name] = torch.stack([experts[task] for task in experts]).double().mean(0).to(device)
    return total


def linear_or_mean(merged: Mapping[str, Tensor], name: str, base: Tensor, experts: Mapping[str, Tensor]) -> Tensor:
    """The merged weight of a linear, and the mean of the experts for all other tensors."""
    return merged[name] if name in merged else average(list(experts.values()))
