"""Number formats of tests: all of them, and short names for integers."""

from __future__ import annotations

from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import BITS, IntFormat
from epmq_cli.quantize.formats.names import FIXED


def ints(bits: int, group_size: int, symmetric: bool = True) -> IntFormat:
    """Integers without zero points if symmetric, with integer zero points otherwise."""
    return IntFormat(bits, group_size, "none" if symmetric else "whole")


def every_format() -> dict[str, NumberFormat]:
    """All formats that `quant.format` and `bits` name, with groups and with one scale per row, by a name."""
    free: list[NumberFormat] = [Fp8Format(size) for size in (-1, 32)]
    free += [IntFormat(4, size, "none", "int8") for size in (-1, 32)]
    free += [IntFormat(bits, size, points) for bits in BITS for size in (-1, 32) for points in ("none", "whole")]
    named = {f"{one.name}-{one.group_size}-{one.zero_points}": one for one in free}
    return {**named, **FIXED}
