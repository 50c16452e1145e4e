"""Iso-C and Iso-CTS: matrices whose singular values are all equal, in the subspace that the task vectors share (Iso-C)
and in their own subspaces too (Iso-CTS) (Marczak et al. 2025, https://arxiv.org/abs/2502.04959, sections 4.1 and 4.2).

Directions with a singular value of zero are dropped, unlike in the reference: their singular vectors are arbitrary, and
the mean singular value would turn them into noise, as with LoRA experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.matrices import TABLES, TaskVectors, matrix_rule
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Choice, Number, Parameters, PerTensor
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.tsv_m import nearest_orthonormal

if TYPE_CHECKING:
    from torch import Tensor


def iso_c(vectors: TaskVectors) -> Tensor:
    """The sum U S V' of the task vectors (out, in), with the mean of S in place of each singular value."""
    return _isotropic(*_leading(vectors.total()))


def iso_cts(vectors: TaskVectors, common: float) -> Tensor:
    """The leading singular vectors of the sum of the task vectors (out, in) and, for the rest of the dimensions, those
    of each task vector outside the space of the former; made orthonormal together, with their mean singular value.

    `common`: the part of the dimensions for the sum, which also gets those that cannot be divided by the tasks. Reads
    each task vector twice.
    """
    total = vectors.total()
    rank = min(total.shape)
    own = min(round((rank - int(rank * common)) / len(vectors)), rank // len(vectors))
    shared = _leading(total, rank - own * len(vectors))
    parts = [shared]
    for task in vectors:
        vector = vectors[task]
        size = float(torch.linalg.matrix_norm(vector))
        parts.append(_leading(vector - shared[0] @ (shared[0].T @ vector), own, size))
    U, S, V = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return _isotropic(nearest_orthonormal(U), S, nearest_orthonormal(V))


def _leading(matrix: Tensor, rank: int | None = None, size: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors (out, r), singular values (r,) and right singular vectors (in, r), with r <= rank, without
    those whose value is a rounding error of numbers of this size, by default the matrix's norm."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    size = float(torch.linalg.vector_norm(S)) if size is None else size
    r = int((S[:rank] > max(matrix.shape) * torch.finfo(S.dtype).eps * size).sum())
    return U[:, :r], S[:r], Vh[:r].T


def _isotropic(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """(out, in): the mean of S times U V'; zero if S is empty."""
    return S.sum() / max(1, len(S)) * (U @ V.T)


@dataclass(frozen=True)
class IsoC(Parameters):
    """`merge=iso_c`.

    `scale`: factor on the merged task vector, the paper's alpha. `tables`: the merge of matrices over the vocabulary,
    the `mean` of their task vectors, or `merge` as all other matrices.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    scale: Annotated[Setting, PerTensor(0, 10)]
    tables: Annotated[str, Choice(TABLES)]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model."""
        return matrix_rule(source, self.tables, self.scale, iso_c)


@dataclass(frozen=True)
class IsoCts(IsoC):
    """`merge=iso_cts`.

    `common_space_fraction`: the part of the dimensions for the common subspace, in [0, 1]; at 1 the merge is Iso-C.
    The other options are those of `merge=iso_c`.
    """

    common_space_fraction: Annotated[float, Number(0, 1)]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model."""
        return matrix_rule(source, self.tables, self.scale, partial(iso_cts, common=self.common_space_fraction))
