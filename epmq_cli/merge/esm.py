"""ESM: merges the task vectors in the principal directions of what they change in the outputs (Li et al. 2026, "Model
merging in the essential subspace", CVPR, pages 31145 to 31154; extended in https://arxiv.org/abs/2606.19164).

For the linears that read the same inputs X, stacked, expert i with task vector dW_i changes the outputs by X dW_i'. Its
leading principal directions P_i and their coordinates A_i = P_i' dW_i are scaled by the relative size of the task
vector, of the direction and of the input column, concatenated over experts, and made orthonormal. A last factor is the
relative size of the result among the linears of the same kind in all layers. The exponents are those of the authors'
code, https://github.com/kiddo127/ESM, as of 2026-11.

Deviations: directions that change no output are dropped, because they are arbitrary and would rotate those of others.
Inputs of the attention's output are measured too, where the code merges it as TSV-M does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.method import Group, MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Parameters, PerTensor
from epmq_cli.merge.regmean import parts
from epmq_cli.merge.settings import Setting, TensorSetting
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.tsv_m import tsv_m

if TYPE_CHECKING:
    from torch import Tensor

NUMBER = re.compile(r"\d+")
SIZE_POWER = 2
"""The exponent of the relative sizes of task vectors, input columns and layers."""
DIRECTION_POWER = 0.15
"""The exponent of the relative variance of a direction."""


@dataclass(frozen=True)
class Subspace:
    """An expert's part of the stacked linears: principal directions (out, k) and their coordinates (k, in), each
    direction scaled. `norm`: of the task vector."""

    directions: Tensor
    coordinates: Tensor
    norm: float


def principal_directions(vector: Tensor, G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The at most `rank` leading eigenvectors (out, k) and eigenvalues (k,) of the moments dW G dW' of the changes in
    the outputs. `vector`: dW (out, in). `G`: moments of the inputs (in, in). Eigenvalues of 0 are left out."""
    out, width = vector.shape
    if out <= width:
        values, directions = torch.linalg.eigh(vector @ G @ vector.T)
        values, directions = values.flip(0), directions.flip(1)
    else:
        squares, Q = torch.linalg.eigh(G)
        directions, S, _ = torch.linalg.svd(vector @ (Q * squares.clamp(min=0).sqrt()), full_matrices=False)
        values = S.square()
    threshold = max(vector.shape) * torch.finfo(values.dtype).eps * float(values[:1].sum())
    k = int((values[:rank] > threshold).sum())
    return directions[:, :k], values[:k]


def subspace(vector: Tensor, G: Tensor, rank: int) -> Subspace:
    """The scaled directions and coordinates of a task vector (out, in), see `principal_directions`."""
    P, values = principal_directions(vector, G, rank)
    scales = (values / values.mean()) ** DIRECTION_POWER
    scales = scales / scales.mean()
    return Subspace(P * scales, scales[:, None] * (P.T @ vector), float(vector.norm()))


def isotropic(matrix: Tensor) -> Tensor:
    """The matrix with each nonzero singular value replaced by their mean."""
    P, D, Q = torch.linalg.svd(matrix, full_matrices=False)
    kept = max(matrix.shape) * torch.finfo(D.dtype).eps * float(D[:1].sum()) < D
    factor: Tensor = D[kept].mean() * (P[:, kept] @ Q[kept])
    return factor


def merged_subspaces(subspaces: Sequence[Subspace]) -> Tensor:
    """The merged task vector (out, in) of stacked linears, up to the factor of their layer; 0 if nothing changes."""
    mean = sum(own.norm for own in subspaces) / len(subspaces)
    U = torch.cat([own.directions for own in subspaces], 1)
    if U.shape[1] == 0:
        return U.new_zeros(len(U), subspaces[0].coordinates.shape[1])
    V = torch.cat([(own.norm / mean) ** SIZE_POWER * own.coordinates for own in subspaces])
    columns = V.norm(dim=0)
    return 2 * isotropic(U) @ isotropic(V * (columns / columns.mean()) ** SIZE_POWER)


def layer_scales(norms: Mapping[Group, float]) -> dict[Group, float]:
    """For each group of linears, the square of its norm relative to the mean over groups whose names differ only in
    numbers, that is in the layer."""
    kinds: dict[str, list[float]] = {}
    for group, norm in norms.items():
        kinds.setdefault(NUMBER.sub("*", " ".join(group)), []).append(norm)
    means = {kind: sum(own) / len(own) for kind, own in kinds.items()}
    relative = {group: norm / (means[NUMBER.sub("*", " ".join(group))] or 1.0) for group, norm in norms.items()}
    return {group: value**SIZE_POWER for group, value in relative.items()}


@dataclass(frozen=True)
class Esm(Parameters):
    """`merge=esm`: `scale` is the factor on the merged task vector. Linears with fewer outputs than there are experts
    take the mean of their task vectors."""

    needs: ClassVar[frozenset[Need]] = frozenset({"batches"})

    scale: Annotated[Setting, PerTensor(0, 10)]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Measures all experts once for each part of the linears whose moments fit into memory. Keeps the merged
        linears in memory."""
        assert data is not None
        vectors: dict[Group, Tensor] = {}
        measured = [group for group in data.linear_groups() if _rows(group, source) >= len(source.tasks)]
        for groups in parts(measured, source, data.memory):
            vectors |= _vectors(groups, source, data)
        scales = layer_scales({group: float(vector.norm()) for group, vector in vectors.items()})
        merged: dict[str, Tensor] = {}
        for group, vector in vectors.items():
            rows = [source.shape(f"{name}.weight")[0] for name in group]
            pieces = torch.split(scales[group] * vector, rows)
            merged |= {f"{name}.weight": piece for name, piece in zip(group, pieces, strict=True)}
        averaged = frozenset(name for name in source.names if source.is_over_vocabulary(name))
        return TensorRule(partial(_tensor, merged, averaged, source.setting(self.scale, 1.0)))


def _rows(group: Group, source: MergeSource) -> int:
    """The outputs of stacked linears."""
    return sum(source.shape(f"{name}.weight")[0] for name in group)


def _vectors(groups: Sequence[Group], source: MergeSource, data: MergeData) -> dict[Group, Tensor]:
    """The merged task vectors of some groups of linears, stacked, in float32."""
    own: dict[Group, list[Subspace]] = {group: [] for group in groups}
    for task in source.tasks:
        moments = data.input_moments(task, [group[0] for group in groups])
        for group in groups:
            G = moments.pop(group[0])
            names = [f"{name}.weight" for name in group]
            vector = torch.cat([source.expert(task, name) - source.base(name) for name in names]).to(G)
            own[group].append(subspace(vector, G, len(vector) // len(source.tasks)))
    return {group: merged_subspaces(own.pop(group)).float().cpu() for group in groups}


def _tensor(
    merged: Mapping[str, Tensor],
    averaged: frozenset[str],
    scale: TensorSetting,
    name: str,
    base: Tensor,
    experts: Mapping[str, Tensor],
) -> Tensor:
    """The merged tensor: other matrices as by TSV-M, other tensors and those over the vocabulary by the mean."""
    if name in merged:
        return base + scale.at(name) * merged[name]
    return tsv_m(name, base, experts, scale, None, averaged)
