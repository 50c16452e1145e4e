"""TSV-M: merges the leading singular vectors of the task vectors (Gargiulo et al. 2025,
https://arxiv.org/abs/2412.00081, section 4, algorithm 1)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.errors import ConfigError
from epmq_cli.merge.matrices import TABLES, TaskVectors
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Choice, Number, Parameters, PerTensor
from epmq_cli.merge.settings import Setting, TensorSetting
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


def merged_singular_vectors(vectors: Iterable[Tensor], rank: int) -> Tensor:
    """The merge of task vectors (out, in): the `rank` leading singular vectors of each, jointly orthonormalized
    and multiplied with their singular values.

    Directions with a singular value of zero are dropped, unlike in the reference: their singular vectors are arbitrary
    and would rotate those of the other experts, as with LoRA experts of a lower rank than `rank`.
    """
    left, strength, right = zip(*(_leading(vector, rank) for vector in vectors), strict=True)
    U, S, V = torch.cat(left, 1), torch.cat(strength), torch.cat(right, 1)
    return (nearest_orthonormal(U) * S) @ nearest_orthonormal(V).T


def nearest_orthonormal(columns: Tensor) -> Tensor:
    """The polar factor P Q' of P D Q' (rows, columns): the closest matrix with orthonormal columns, or, if its columns
    are linearly dependent, the closest partial isometry on their span."""
    P, D, Q = torch.linalg.svd(columns, full_matrices=False)
    mask = _smallest(D, columns) < D
    factor: Tensor = P[:, mask] @ Q[mask]
    return factor


def _leading(vector: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors (out, r), singular values (r,), right singular vectors (in, r), with r <= rank."""
    U, S, Vh = torch.linalg.svd(vector, full_matrices=False)
    r = int((S[:rank] > _smallest(S, vector)).sum())
    return U[:, :r], S[:r], Vh[:r].T


def _smallest(values: Tensor, matrix: Tensor) -> float:
    """The largest singular value that counts as rounding error, as for the numerical rank of a matrix. `values`: in
    descending order, may be empty."""
    return max(matrix.shape) * torch.finfo(values.dtype).eps * float(values[:1].sum())


def tsv_m(
    name: str,
    base: Tensor,
    experts: Mapping[str, Tensor],
    scale: TensorSetting,
    fraction: float | None,
    averaged: Collection[str],
) -> Tensor:
    """Base plus `scale` times the merge of the task vectors. `averaged` tensors, tensors that are not matrices, and
    matrices with fewer dimensions than experts take the mean of their task vectors."""
    vectors = TaskVectors(base, experts)
    most = min(base.shape) if base.ndim == 2 else 0
    rank = most // len(experts) if fraction is None else int(fraction * most)
    if rank == 0 or name in averaged:
        return base + scale.at(name) * (vectors.total() / len(vectors))
    return base + scale.at(name) * merged_singular_vectors(vectors.values(), rank)


@dataclass(frozen=True)
class TsvM(Parameters):
    """`merge=tsv_m`.

    `scale`: factor on the merged task vector, the paper's alpha. `fraction`: the part of each task vector's singular
    vectors that is kept, at most 1 / experts; None for 1 / experts, as in the paper. `tables`: the merge of matrices
    over the vocabulary, the `mean` of their task vectors, or `merge` as all other matrices (formerly `svd`).
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    scale: Annotated[Setting, PerTensor(0, 10)]
    fraction: Annotated[float | None, Number(0, 1, open_low=True, null=True)]
    tables: Annotated[str, Choice(TABLES, old=("svd",))]

    def check(self, tasks: Sequence[str]) -> None:
        """ConfigError if the fractions of all experts sum to more than 1."""
        super().check(tasks)
        if self.fraction is not None and self.fraction * len(tasks) > 1 + 1e-9:
            raise ConfigError(
                f"merge.fraction must be at most 1 / {len(tasks)} for {len(tasks)} experts, whose singular vectors are "
                f"made orthonormal together, got {self.fraction}; null means 1 / {len(tasks)}"
            )

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model."""
        averaged = [name for name in source.names if self.tables == "mean" and source.is_over_vocabulary(name)]
        scale = source.setting(self.scale, 1.0)
        rule = partial(tsv_m, scale=scale, fraction=self.fraction, averaged=frozenset(averaged))
        return TensorRule(rule, on_device=True)
