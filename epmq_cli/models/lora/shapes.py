"""The shapes of an adapter's tensors against those of the base's tensors that they are added to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LowRank:
    """The shapes of one module's LoRA by part. `transposed`: the config says that weights are (in, out)."""

    shapes: Mapping[str, Shape]
    transposed: bool

    @property
    def a(self) -> Shape:
        """(rank, in, ...), or (rank, rows) of an embedding."""
        return self.shapes["lora_embedding_A" if self.is_embedding else "lora_A"]

    @property
    def b(self) -> Shape:
        """(out, rank, ...)."""
        return self.shapes["lora_embedding_B" if self.is_embedding else "lora_B"]

    @property
    def is_embedding(self) -> bool:
        """Whether a table of embeddings is adapted."""
        return "lora_embedding_A" in self.shapes

    @property
    def rank(self) -> int:
        """The rank; 0 of a tensor without axes."""
        return self.a[0] if self.a else 0

    def turned(self, shape: Shape) -> bool:
        """Whether a weight of this shape is stored as (in, out)."""
        return self.transposed and len(shape) == 2

    def weight(self, shape: Shape) -> Shape:
        """The shape of the weight that A and B adapt, where the base's is `shape`."""
        found = (self.b[0], *self.a[1:])
        return found[::-1] if self.is_embedding or self.turned(shape) else found

    def problem(self, shape: Shape) -> str | None:
        """Why the parts cannot belong to one weight with as many axes as `shape`; None where they can."""
        a, b = self.a, self.b
        if not len(a) == len(b) == len(shape) > 1 or not a[0] == b[1] > 0 or any(size != 1 for size in b[2:]):
            return f"A {list(a)} and B {list(b)}, which do not have one rank above 0 and the axes of {list(shape)}"
        lengths = self.shapes.get("lora_magnitude_vector")
        if lengths is not None and _squeezed(lengths) != (b[0],):
            return f"the lengths {list(lengths)}, while the module has {b[0]} outputs"
        diagonal = self.shapes.get("lora_diag")
        if diagonal is not None and diagonal != (a[0],):
            return f"the diagonal {list(diagonal)}, while its rank is {a[0]}"
        return None

    def fits(self, shape: Shape) -> bool:
        """Whether they adapt a weight of this shape."""
        return self.problem(shape) is None and self.weight(shape) == shape


def _squeezed(shape: Shape) -> Shape:
    """(n,) of a vector, or of one that is stored as (1, n, 1, ...), as DoRA's of convolutions are."""
    return (shape[1],) if len(shape) > 2 and shape[0] == 1 and all(size == 1 for size in shape[2:]) else shape


def rows_problem(shape: Shape, table: Shape, rows: Sequence[int]) -> str | None:
    """Why these rows cannot be put into a table; None where they can."""
    if len(table) != 2 or shape != (len(rows), *table[1:]):
        return f"rows of the shape {list(shape)} for {len(rows)} token ids and a table {list(table)}"
    if len(set(rows)) < len(rows) or any(row >= table[0] for row in rows):
        return f"token ids that repeat or are not below {table[0]}, the rows of the table"
    return None
