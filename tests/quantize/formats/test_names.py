"""Oracles: tables of options and their formats, and a JSON round trip."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import BITS, IntFormat
from epmq_cli.quantize.formats.microscaling import Nvfp4Format
from epmq_cli.quantize.formats.names import FIXED, FormatOptions, as_json, from_json, labels, widths_of


@pytest.mark.parametrize(
    ("bits", "widths"), [(2, (2,)), (8, (8,)), (3.0, (3,)), (2.5, (2, 3)), (3.25, (3, 4)), (5, (5,)), (7.9, (7, 8))]
)
def test_bits_are_exact_or_the_two_neighbours(bits: float, widths: tuple[int, ...]) -> None:
    assert widths_of(bits, symmetric=True) == widths
    assert FormatOptions(bits, 32, True).formats() == tuple(IntFormat(width, 32, "none") for width in widths)


@pytest.mark.parametrize("bits", [1, 9, 1.5, 8.5, True, "4", "some", None, float("nan")])
def test_other_bits_are_refused(bits: object) -> None:
    with pytest.raises(
        ConfigError, match="bits must be one of 2, 3, 4, 5, 6, 7, 8, or a number between them for a mix"
    ):
        widths_of(bits, symmetric=True)


@pytest.mark.parametrize(
    ("bits", "symmetric", "format", "formats"),
    [
        (4, False, "int", (IntFormat(4, 64, "whole"),)),
        (4, True, "w4a8", (IntFormat(4, 64, "none", "int8"),)),
        (8, True, "fp8", (Fp8Format(64),)),
        (5, True, ["int4", "fp8"], (IntFormat(4, 64, "none"), Fp8Format(64))),
        (5, True, ["fp8", "int4"], (IntFormat(4, 64, "none"), Fp8Format(64))),
        (2.5, True, ["int2", "int8"], (IntFormat(2, 64, "none"), IntFormat(8, 64, "none"))),
    ],
)
def test_options_name_formats(
    bits: float, symmetric: bool, format: str | Sequence[str], formats: tuple[NumberFormat, ...]
) -> None:
    assert FormatOptions(bits, 64, symmetric, format).formats() == formats


@pytest.mark.parametrize(
    ("bits", "symmetric", "format", "message"),
    [
        (3.5, False, "int", "bits must be one of 2, 3, 4, 5, 6, 7, 8 with quant.symmetric=false, got 3.5"),
        (4, "yes", "int", "quant.symmetric must be one of true, false, got 'yes'"),
        (4, True, "fp8", "quant.format=fp8 needs bits=8, got bits=4"),
        (8, True, "fp8_block", "quant.format=fp8_block needs group_size=128, got group_size=64"),
        (8, True, "w4a8", "quant.format=w4a8 needs bits=4, got bits=8"),
        (4, False, "w4a8", "w4a8 has no zero points; use quant.symmetric=true"),
        (4, True, "nvfp4a16", "quant.format=nvfp4a16 needs group_size=16, got group_size=64"),
        (4, True, "w8a8", "quant.format=w8a8 needs bits=8 group_size=-1, got bits=4 group_size=64"),
        (4, False, "mxfp4", "mxfp4 has no zero points; use quant.symmetric=true"),
        (6, True, ["mxfp4a16", "fp8"], "quant.format must be one of int2, .*, got 'mxfp4a16'"),
        (8, False, "fp8", "fp8 has no zero points; use quant.symmetric=true"),
        (
            4,
            True,
            "fp4",
            "quant.format must be one of int, fp8, w4a8, fp8_dynamic, fp8_static, fp8_block, w8a8, .* got 'fp4'",
        ),
        (4, True, "int4", "quant.format must be one of int, fp8, .* got 'int4'"),
        (5, True, ["int4", "int9"], "quant.format must be one of int2, int3, .* int8, fp8, got 'int9'"),
        (8, True, ["int8", "fp8"], r"a list of two formats with different bits such as \[int4, fp8\], got"),
        (5, True, ["fp8"], r"a list of two formats with different bits such as \[int4, fp8\], got \['fp8'\]"),
        (4, True, ["int4", "fp8"], r"bits must lie between 4 and 8 with quant.format=\['int4', 'fp8'\], got 4"),
        (3, False, ["int2", "int4"], "quant.symmetric=false takes one format; a mix of formats needs"),
    ],
)
def test_options_that_name_no_format_are_refused(
    bits: float, symmetric: bool, format: str | Sequence[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FormatOptions(bits, 64, symmetric, format).formats()


def test_a_budget_chooses_among_widths_and_group_sizes() -> None:
    assert FormatOptions(4, [32, -1, 64], True, ["int4"]).candidates() == tuple(
        IntFormat(4, size, "none") for size in (-1, 64, 32)
    )
    several = FormatOptions(4, [64, 128], True).candidates()
    assert several == tuple(IntFormat(bits, size, "none") for bits in (2, 3, 4, 8) for size in (128, 64))
    assert labels(several[:2]) == ["int2 in groups of 128", "int2 in groups of 64"]
    assert labels(several[::2]) == ["int2", "int3", "int4", "int8"]


@pytest.mark.parametrize("sizes", [[], [32, 32]])
def test_lists_of_group_sizes_have_different_ones(sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match="group_size must be a number, or a list of different ones such as"):
        FormatOptions(4, sizes, True).candidates()


@pytest.mark.parametrize("bits", [4, 3.5])
def test_several_group_sizes_need_a_budget(bits: float) -> None:
    with pytest.raises(ConfigError, match=r"group_size must be one number without budget, .* got \[32, 64\]; give"):
        FormatOptions(bits, [32, 64], True).formats()


@pytest.mark.parametrize("name", FIXED)
def test_names_determine_bits_and_group_size(name: str) -> None:
    format = FIXED[name]
    assert format.name == name
    assert FormatOptions(format.bits, format.group_size, True, name).formats() == (format,)


EVERY: list[NumberFormat] = [Fp8Format(-1), Fp8Format(64), Nvfp4Format(8.0), *FIXED.values()]
EVERY += [IntFormat(4, 64, "none", "int8"), Fp8Format(-1, "fp8_static", 1, 0.25), Nvfp4Format(8.0, "nvfp4", 3.0)]
EVERY += [IntFormat(bits, size, zero) for bits in BITS for size in (-1, 64) for zero in ("none", "whole", "real")]


@pytest.mark.parametrize("format", EVERY, ids=repr)
def test_formats_survive_json_and_equal_only_themselves(format: NumberFormat) -> None:
    assert from_json(json.loads(json.dumps(as_json(format)))) == format
    assert [other for other in EVERY if other == format] == [format]
