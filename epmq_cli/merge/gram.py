"""Inner products of tensors, from which geometric methods compute their factors: in float64, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from epmq_cli.runtime.threads import spread

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 16  # elements of each tensor that are in float64 at a time, per thread


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """(n, n) in float64: the inner products of n tensors of one shape, each read as a vector."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    chunks = zip(*(torch.split(tensor, CHUNK) for tensor in flat), strict=True)

    def products(chunk: tuple[Tensor, ...]) -> Tensor:
        matrix = torch.stack(chunk).double()
        return matrix @ matrix.T

    return torch.stack(spread(products, chunks)).sum(0)


def row_grams(matrices: Sequence[Tensor]) -> Tensor:
    """(rows, n, n) in float64: for each row, the inner products of this row of n matrices."""
    step = max(1, CHUNK // max(1, matrices[0].shape[1]))
    chunks = zip(*(torch.split(matrix, step) for matrix in matrices), strict=True)

    def products(chunk: tuple[Tensor, ...]) -> Tensor:
        rows = torch.stack(chunk, 1).double()
        return rows @ rows.mT

    return torch.cat(spread(products, chunks))


def cosines(products: Tensor, lengths: Tensor) -> Tensor:
    """Cosines from inner products and products of lengths, in [-1, 1]; 0 for vectors of length 0."""
    return torch.where(lengths > 0, products / lengths, 0.0).clamp(-1, 1)


def as_rows(tensor: Tensor) -> Tensor:
    """A tensor as a matrix with a row for each output; a vector, or a single number, is one row."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(len(tensor), -1)


def combination(factors: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the tensors, each times its factor."""
    total = factors[0] * tensors[0]
    for factor, tensor in zip(factors[1:], tensors[1:], strict=True):
        total += factor * tensor
    return total
