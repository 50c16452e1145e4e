"""Rows of large matrices, some at a time, so that what is computed from them needs little memory beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 24  # numbers; of up to 4096 x 4096, a matrix is one piece
LEAST = 64  # rows; products of fewer rows use other kernels
CACHED = 1 << 17  # numbers; in float64 a few such pieces fit into the cache of a processor core


def row_pieces(rows: slice, width: int) -> Iterator[slice]:
    """The rows of a matrix with this width in pieces of at most `PIECE` numbers; one piece if there are none."""
    return _pieces(rows, max(PIECE // max(width, 1), LEAST))


def cached_pieces(matrix: Tensor) -> Iterator[slice]:
    """The rows of a matrix in pieces for sums over its elements. On the CPU, what is computed from a piece stays in the
    processor's cache; elsewhere they are those of `row_pieces`."""
    rows, width = slice(0, len(matrix)), matrix.shape[1]
    if matrix.device.type != "cpu":
        return row_pieces(rows, width)
    return _pieces(rows, max(CACHED // max(width, 1), 1))


def _pieces(rows: slice, step: int) -> Iterator[slice]:
    for start in range(rows.start, max(rows.stop, rows.start + 1), step):
        yield slice(start, min(start + step, rows.stop))
