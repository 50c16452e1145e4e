"""Names of number formats in quant.format and bits, and formats as JSON."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from epmq_cli.config.validate import check_choice
from epmq_cli.errors import ConfigError, literal
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.formats.fp8 import BLOCK, Fp8Format
from epmq_cli.quantize.formats.int import BITS, IntFormat
from epmq_cli.quantize.formats.microscaling import MxFormat, Nvfp4Format

KINDS: dict[str, type[Any]] = {"int": IntFormat, "fp8": Fp8Format, "mx": MxFormat, "nvfp4": Nvfp4Format}
"""The classes of formats by their name in JSON."""
FREE = ("int", "fp8", "w4a8")
"""The names of quant.format that take any group size."""
FIXED: dict[str, NumberFormat] = {
    "fp8_dynamic": Fp8Format(-1, "fp8"),
    "fp8_static": Fp8Format(-1, "fp8_static"),
    "fp8_block": Fp8Format(BLOCK, "fp8_group", BLOCK),
    "w8a8": IntFormat(8, -1, "none", "int8"),
    "nvfp4a16": Nvfp4Format(),
    "nvfp4": Nvfp4Format(activations="nvfp4"),
    "mxfp4a16": MxFormat(4),
    "mxfp4": MxFormat(4, "mxfp4"),
    "mxfp6a16": MxFormat(6),
    "mxfp6a8": MxFormat(6, "mxfp8"),
    "mxfp8a16": MxFormat(8),
    "mxfp8": MxFormat(8, "mxfp8"),
}
"""The other names of quant.format, which determine bits and group size: names of compressed-tensors' schemes, but for
fp8_static, whose scales of weights are by row instead of by tensor."""
NAMES = (*(f"int{bits}" for bits in BITS), "fp8")
"""The formats that a mix may name. transformers cannot load a mix with the others: it dequantizes them to bfloat16,
whatever the type of the model, or rounds activations."""
SENSITIVITIES = ("objective", "divergence")
"""By what a mix chooses: the losses of the groups, or these times their effect on the model's outputs."""
WIDTHS = ("int2", "int3", "int4", "int8")
"""The formats among which `budget` chooses with quant.format=int."""


@dataclass(frozen=True)
class FormatOptions:
    """The options of a quantizer that describe its number formats.

    `bits`: of the codes. `group_size`: see NumberFormat; or several, among which `budget` chooses. `symmetric`: whether
    there are no zero points. `format`: one of `FREE` and `FIXED`, or two of `NAMES`, which are mixed so that codes have
    `bits` on average. `kv_cache`: the format in which engines cache keys and values, `fp8`; None for that of the model.
    `sensitivity`: by what a mix chooses, one of `SENSITIVITIES`.
    """

    bits: float
    group_size: int | Sequence[int]
    symmetric: bool
    format: str | Sequence[str] = "int"
    kv_cache: str | None = None
    sensitivity: str = SENSITIVITIES[0]

    def formats(self) -> tuple[NumberFormat, ...]:
        """One format, or two in ascending order of bits; ConfigError if the options are invalid."""
        check_choice("quant.kv_cache", self.kv_cache, (None, "fp8"))
        check_choice("quant.sensitivity", self.sensitivity, SENSITIVITIES)
        check_choice("quant.symmetric", self.symmetric, (True, False))
        if not isinstance(self.group_size, int):
            raise ConfigError(
                f"group_size must be one number without budget, because bits do not count scales, got "
                f"{literal(self.group_size)}; give one number, or a budget such as budget=310MB"
            )
        if not isinstance(self.format, str):
            return self._mixed(self.format, self.group_size)
        check_choice("quant.format", self.format, (*FREE, *FIXED))
        if self.format == "int":
            return tuple(self._named(f"int{bits}", self.group_size) for bits in widths_of(self.bits, self.symmetric))
        format = self._named(self.format, self.group_size)
        needed = {"bits": format.bits, "group_size": format.group_size}
        other = {option: getattr(self, option) for option, value in needed.items() if getattr(self, option) != value}
        if other:
            wanted = " ".join(f"{option}={needed[option]}" for option in other)
            got = " ".join(f"{option}={literal(value)}" for option, value in other.items())
            raise ConfigError(f"quant.format={self.format} needs {wanted}, got {got}")
        return (format,)

    def _mixed(self, names: Sequence[str], size: int) -> tuple[NumberFormat, ...]:
        for name in names:
            check_choice("quant.format", name, NAMES)
        formats = sorted((self._named(name, size) for name in names), key=lambda format: format.bits)
        if len(formats) != 2 or formats[0].bits == formats[1].bits:
            raise ConfigError(
                f"quant.format must be one format, or a list of two formats with different bits such as [int4, fp8], "
                f"got {literal(names)}"
            )
        if not formats[0].bits < self.bits < formats[1].bits:
            raise ConfigError(
                f"bits must lie between {formats[0].bits} and {formats[1].bits} with quant.format={literal(names)}, "
                f"got {literal(self.bits)}"
            )
        if not self.symmetric:
            raise ConfigError("quant.symmetric=false takes one format; a mix of formats needs quant.symmetric=true")
        return tuple(formats)

    def candidates(self) -> tuple[NumberFormat, ...]:
        """The formats among which `budget` chooses, in ascending order of bits; ConfigError if the options are invalid.
        `bits` must be whole, and has no effect."""
        check_choice("quant.sensitivity", self.sensitivity, SENSITIVITIES)
        if self.bits not in BITS:
            raise ConfigError(f"bits={literal(self.bits)} and budget both limit the size; leave out one of them")
        if self.symmetric is not True:
            raise ConfigError("budget mixes formats, which needs quant.symmetric=true, got quant.symmetric=false")
        names = WIDTHS if self.format == "int" else self.format
        sizes = (self.group_size,) if isinstance(self.group_size, int) else self.group_size
        if not sizes or len({*sizes}) < len(sizes):
            raise ConfigError(
                "group_size must be a number, or a list of different ones such as [32, 64, 128], got "
                f"{literal(self.group_size)}"
            )
        if isinstance(names, str) or len({*names}) < len(names) or len(names) * len(sizes) < 2:
            raise ConfigError(
                "budget chooses among formats, so quant.format must be int, or a list of different formats such as "
                f"[int3, int4, fp8], got {literal(self.format)}"
            )
        for name in names:
            check_choice("quant.format", name, NAMES)
        return tuple(sorted((self._named(name, size) for name in names for size in sizes), key=by_size))

    def _named(self, name: str, size: int) -> NumberFormat:
        """The format of one of `NAMES` and `FIXED`, in groups of `size` if its name leaves them open."""
        if name.startswith("int"):
            return IntFormat(int(name.removeprefix("int")), size, "none" if self.symmetric else "whole")
        if not self.symmetric:
            raise ConfigError(f"{name} has no zero points; use quant.symmetric=true")
        if name == "w4a8":
            return IntFormat(4, size, "none", "int8")
        return FIXED.get(name) or Fp8Format(size)


def by_size(format: NumberFormat) -> tuple[int, float]:
    """The order of the formats of a mix: by bits, then by the number of scales, rows before groups."""
    return format.bits, -math.inf if format.group_size == -1 else -format.group_size


def in_groups(format: NumberFormat) -> str:
    """How weights share scales, in words."""
    return "with one scale per row" if format.group_size == -1 else f"in groups of {format.group_size}"


def labels(formats: Collection[NumberFormat]) -> list[str]:
    """The names of formats for messages, with their groups if some have the same name."""
    names = [format.name for format in formats]
    if len({*names}) == len(names):
        return names
    return [f"{format.name} {in_groups(format)}" for format in formats]


def widths_of(bits: object, symmetric: bool) -> tuple[int, ...]:
    """The integer widths whose mix has this many bits on average: the number itself, or its two neighbours; ConfigError
    for other numbers.

    A mix needs formats without zero points: with zero points, transformers must dequantize on load, and then it uses
    the first format for all linears.
    """
    if bits in BITS and not isinstance(bits, bool):
        return (int(bits),)
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not BITS[0] < bits < BITS[-1]:
        named = ", ".join(map(str, BITS))
        raise ConfigError(f"bits must be one of {named}, or a number between them for a mix such as 3.5, got {bits!r}")
    if not symmetric:
        raise ConfigError(
            f"bits must be one of {', '.join(map(str, BITS))} with quant.symmetric=false, got {bits!r}; "
            "a mix of bits needs quant.symmetric=true"
        )
    return max(width for width in BITS if width < bits), min(width for width in BITS if width > bits)


def as_json(format: NumberFormat) -> dict[str, Any]:
    """A format as JSON."""
    kind = next(name for name, kind in KINDS.items() if isinstance(format, kind))
    return {"kind": kind, **asdict(format)}  # type: ignore[call-overload]  # formats are dataclasses


def from_json(fields: Mapping[str, Any]) -> NumberFormat:
    """The inverse of `as_json`; LookupError or TypeError for other input."""
    format: NumberFormat = KINDS[fields["kind"]](**{name: value for name, value in fields.items() if name != "kind"})
    return format
