"""Splits sums and rows over processes. The numerics take a `Sharing` and do not depend on the number of processes.

The module epmq_cli.runtime.distributed is the Sharing of torchrun's processes, `ALONE` that of a single process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Sharing(Protocol):
    """Every process has its own samples and its own rows of large matrices (`row_range`)."""

    def world_size(self) -> int:
        """The number of processes."""

    def row_range(self, length: int) -> slice:
        """This process's rows out of `length`, contiguous."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of this tensor over all processes, in place."""

    def reduce_rows(self, tensor: Tensor) -> Tensor:
        """This process's rows of the sum of a tensor over all processes; the tensor is overwritten."""

    def all_gather_rows(self, part: Tensor, length: int) -> Tensor:
        """The whole tensor with `length` rows, from the rows of all processes."""


class _Alone:
    def world_size(self) -> int:
        return 1

    def row_range(self, length: int) -> slice:
        return slice(0, length)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce_rows(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather_rows(self, part: Tensor, length: int) -> Tensor:
        return part


ALONE: Sharing = _Alone()
