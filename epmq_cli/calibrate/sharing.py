"""How processes share sums and rows; numerics are given one and do not know how many processes there are.

The module epmq_cli.runtime.distributed is a Sharing among torchrun's processes, `ALONE` that of a single process.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Sharing(Protocol):
    """Every process holds its own samples, and its own rows of large matrices: those of `row_range`."""

    def world_size(self) -> int:
        """How many processes there are."""

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
