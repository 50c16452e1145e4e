"""Operations of a stage, from which its time is estimated."""

from __future__ import annotations

from dataclasses import astuple, dataclass

CALLS = 60
"""The time of a linear of a block in a forward pass, with norms, attention and activations around it, beside its
operations: in additions of small tensors. It matters for small models only, on which it was measured."""


@dataclass
class Operations:
    """`single` and `double`: floating-point operations in float32 and float64. `calls`: calls of torch. `bytes`: of
    files that are read and hashed or written. `seconds`: what is measured already, such as the decoding of samples."""

    single: float = 0.0
    double: float = 0.0
    calls: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


def times(operations: Operations, factor: float) -> Operations:
    """The operations, so many times."""
    return Operations(*(factor * value for value in astuple(operations)))


def plus(one: Operations, other: Operations) -> Operations:
    """The operations of both."""
    return Operations(*map(sum, zip(astuple(one), astuple(other), strict=True)))
