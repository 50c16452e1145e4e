"""`merge.space=core`: merges LoRA experts in their common low-rank space (Core Space, Panariello et al. 2025,
https://arxiv.org/abs/2509.17786), without a dense task vector of any expert.

Expert t adds s_t B_t A_t to a matrix (out, in). U holds the left singular vectors of all B_t side by side, V the right
singular vectors of all A_t below each other. The core of the expert is C_t = s_t (U' B_t) (A_t V), and its task vector
is exactly U C_t V'. A method merges the cores as the experts of a base of zeros, and the result is the base plus U C V'
for the merged core C.

Singular vectors of a singular value of zero are set to zero, unlike in the reference: they are arbitrary, as when two
experts are equal. The cores keep their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import ModelError
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.lora.adapter import Adapted
from epmq_cli.models.model_folder import Completed
from epmq_cli.runtime.console import say

if TYPE_CHECKING:
    from torch import Tensor

Factors = tuple["Tensor", "Tensor", float]
"""B (out, rank), A (rank, in) and the scale of their product."""


@dataclass(frozen=True)
class Cores:
    """The cores (m, n) of one tensor in float32, one for each expert, and its bases U (out, m) and V (in, n), where m
    and n are the sum of the ranks, or the matrix's dimension if that is smaller."""

    U: Tensor
    V: Tensor
    cores: Sequence[Tensor]


def cores(factors: Sequence[Factors]) -> Cores:
    """The cores of products of one shape, computed in float64."""
    wide = [(B.double(), A.double(), scale) for B, A, scale in factors]
    U, V = basis(torch.cat([B for B, _, _ in wide], 1)), basis(torch.cat([A for _, A, _ in wide]).T)
    return Cores(U.float(), V.float(), [(scale * (U.T @ B) @ (A @ V)).float() for B, A, scale in wide])


def basis(columns: Tensor) -> Tensor:
    """The left singular vectors (rows, min(rows, columns)) of a matrix; zeros for singular values of zero."""
    U, S, _ = torch.linalg.svd(columns, full_matrices=False)
    smallest = max(columns.shape) * torch.finfo(S.dtype).eps * S[:1]
    vectors: Tensor = U * (smallest < S)
    return vectors


class CoreSource(MergeSource):
    """The models of a source, with the cores as experts and zeros as base for those tensors to which experts add
    products of low rank, and to which none does anything else.

    ModelError if an expert is not an adapter of the base. Holds the cores of one tensor.
    """

    def __init__(self, source: MergeSource) -> None:
        vars(self).update(vars(source))  # a view of the same models
        self._adapters = {task: self._adapter(task) for task in self.tasks}
        self._last: tuple[str, Cores] | None = None
        self.ranks = {name: ranks for name in self.names if any(ranks := self._ranks(name))}
        """By tensor with cores, the rank of each expert."""
        say(f"merge.space=core: {len(self.ranks)} of {len(self.names)} tensors are merged as products of low rank")

    def base(self, name: str) -> Tensor:
        """Zeros, or the base's tensor; see MergeSource."""
        return torch.zeros(self.shape(name)) if name in self.ranks else super().base(name)

    def expert(self, task: str, name: str) -> Tensor:
        """The core, or the tensor, of a task's expert; see MergeSource."""
        if name not in self.ranks:
            return super().expert(task, name)
        return self._cores(name).cores[self.tasks.index(task)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the cores, or of the merged tensor."""
        shape = super().shape(name)
        return tuple(min(size, sum(self.ranks[name])) for size in shape) if name in self.ranks else shape

    def full(self, name: str, merged: Tensor) -> Tensor:
        """The merged tensor: that of the merged core, or the one given if the tensor has no cores."""
        if name not in self.ranks:
            return merged
        own = self._cores(name)
        return torch.addmm(super().base(name), own.U @ merged.view(self.shape(name)), own.V.T)

    def _whole(self, name: str) -> list[Tensor]:
        if name not in self.ranks:
            return super()._whole(name)
        return [self.base(name), *self._cores(name).cores]

    def _adapter(self, task: str) -> Adapted:
        folder = self._model(task).folder
        tensors = folder.source
        tensors = tensors.expert.source if isinstance(tensors, Completed) else tensors
        if not isinstance(tensors, Adapted) or tensors.base is not self._base.folder:
            raise ModelError(
                f"{folder.role}: {folder.path} is not a LoRA adapter of the base, and merge.space=core merges adapters "
                "alone; give the folder of the adapter, or choose merge.space=full"
            )
        return tensors

    def _ranks(self, name: str) -> list[int]:
        """The rank of what each expert adds to a tensor; [] if an expert changes it in another way."""
        if name in self.padded:
            return []
        stored, found = self._base.names[name], list[int]()
        for task, adapter in self._adapters.items():
            own = self._experts[task].names[name]
            rank = adapter.rank(own) if own == stored else None
            if rank is None:
                return []
            found.append(rank)
        return found

    def _cores(self, name: str) -> Cores:
        last = self._last
        if last is None or last[0] != name:
            self._last = last = name, cores([self._factors(task, name) for task in self.tasks])
        return last[1]

    def _factors(self, task: str, name: str) -> Factors:
        if not self.ranks[name][self.tasks.index(task)]:
            rows, columns = super().shape(name)
            return torch.zeros(rows, 0), torch.zeros(0, columns), 1.0
        B, A, scale = self._adapters[task].factors(self._experts[task].names[name])
        return self._checked(task, name, B), self._checked(task, name, A), scale
