"""Checks the shapes of an adapter's tensors against the base's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LowRank:
    """The shapes of the LoRA parts of one module. `transposed`: the config declares weights as (in, out)."""

    shapes: Mapping[str, Shape]
    transposed: bool

    @property
    def a(self) -> Shape:
        """The shape of A: (rank, in, ...), or (rank, rows) for an embedding."""
        return self.shapes["lora_embedding_A" if self.is_embedding else "lora_A"]

    @property
    def b(self) -> Shape:
        """The shape of B: (out, rank, ...)."""
        return self.shapes["lora_embedding_B" if self.is_embedding else "lora_B"]

    @property
    def is_embedding(self) -> bool:
        """Whether the module is an embedding table."""
        return "lora_embedding_A" in self.shapes

    @property
    def rank(self) -> int:
        """The rank; 0 for a scalar tensor."""
        return self.a[0] if self.a else 0

    def turned(self, shape: Shape) -> bool:
        """Whether a weight of this shape is stored as (in, out)."""
        return self.transposed and len(shape) == 2

    def weight(self, shape: Shape) -> Shape:
        """The shape of the weight that A and B adapt, given the base's `shape`."""
        size = (self.b[0], *self.a[1:])
        return size[::-1] if self.is_embedding or self.turned(shape) else size

    def problem(self, shape: Shape) -> str | None:
        """Why the parts do not fit one weight with as many axes as `shape`; None if they fit."""
        a, b = self.a, self.b
        if not len(a) == len(b) == len(shape) > 1 or not a[0] == b[1] > 0 or any(size != 1 for size in b[2:]):
            return f"A {list(a)} and B {list(b)} must have the same rank above 0 and as many axes as {list(shape)}"
        lengths = self.shapes.get("lora_magnitude_vector")
        if lengths is not None and _squeezed(lengths) != (b[0],):
            return f"lora_magnitude_vector has the shape {list(lengths)}, but the module has {b[0]} outputs"
        diagonal = self.shapes.get("lora_diag")
        if diagonal is not None and diagonal != (a[0],):
            return f"lora_diag has the shape {list(diagonal)}, but the rank is {a[0]}"
        return None

    def fits(self, shape: Shape) -> bool:
        """Whether the parts fit a weight of this shape."""
        return self.problem(shape) is None and self.weight(shape) == shape


def _squeezed(shape: Shape) -> Shape:
    """Reduces (1, n, 1, ...) to (n,). DoRA stores the magnitudes of convolutions in this shape."""
    return (shape[1],) if len(shape) > 2 and shape[0] == 1 and all(size == 1 for size in shape[2:]) else shape


def rows_problem(shape: Shape, table: Shape, rows: Sequence[int]) -> str | None:
    """Why these rows do not fit a table; None if they fit."""
    if len(table) != 2 or shape != (len(rows), *table[1:]):
        return f"its rows have the shape {list(shape)}, but there are {len(rows)} token ids and a table {list(table)}"
    if len(set(rows)) < len(rows) or any(row >= table[0] for row in rows):
        return f"its token ids must be unique and below {table[0]}, the number of rows of the table"
    return None
