"""Short names for integer formats in tests."""

from __future__ import annotations

from epmq_cli.quantize.formats.int import IntFormat


def ints(bits: int, group_size: int, symmetric: bool = True) -> IntFormat:
    """Integers without zero points if symmetric, with integer zero points otherwise."""
    return IntFormat(bits, group_size, "none" if symmetric else "whole")
