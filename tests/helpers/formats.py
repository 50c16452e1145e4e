"""Integer formats as the tests name them."""

from __future__ import annotations

from epmq_cli.quantize.formats.int import IntFormat


def ints(bits: int, group_size: int, symmetric: bool = True) -> IntFormat:
    """Integers without zero points where symmetric, with whole ones elsewhere."""
    return IntFormat(bits, group_size, "none" if symmetric else "whole")
