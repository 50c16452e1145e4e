"""Rows of large matrices, some at a time, so that what is computed from them needs little memory beside them."""

from __future__ import annotations

from collections.abc import Iterator

PIECE = 1 << 24  # numbers; of up to 4096 x 4096, a matrix is one piece
LEAST = 64  # rows; products of fewer rows use other kernels


def row_pieces(rows: slice, width: int) -> Iterator[slice]:
    """The rows of a matrix with this width in pieces of at most `PIECE` numbers; one piece if there are none."""
    step = max(PIECE // max(width, 1), LEAST)
    for start in range(rows.start, max(rows.stop, rows.start + 1), step):
        yield slice(start, min(start + step, rows.stop))
