"""Oracles: the numbers of the formats written out, the nearest of all codes, and closed forms of scales."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import Grid, NumberFormat, by_group
from epmq_cli.quantize.formats.microscaling import MxFormat, Nvfp4Format, nearest
from epmq_cli.quantize.formats.names import FIXED
from epmq_cli.quantize.gptq import gptq
from epmq_cli.quantize.rtn import rtn
from tests.helpers.formats import every_format
from tests.helpers.tiers import only

EVERY = every_format()
SEARCHES = ("mse", "hessian")
SMALL = {
    4: [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    6: [*(m / 8 for m in range(16)), *(m / 4 for m in range(8, 16)), *(m / 2 for m in range(8, 16))],
}


def weight(rows: int = 6, columns: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def codes_of(format: NumberFormat) -> Tensor:
    """All codes of a format, found by encoding every float16 number."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).float()
    return format.encode(every[every.isfinite()], Grid(torch.ones(1), None)).float().unique()


@pytest.mark.parametrize("bits", SMALL)
def test_numbers_are_those_of_the_specification(bits: int) -> None:
    positive = torch.tensor(SMALL[bits])
    assert len(positive) == 1 << (bits - 1)
    assert torch.equal(codes_of(MxFormat(bits)), torch.cat([-positive, positive]).unique())


def test_halves_go_to_the_even_mantissa() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0, -0.75])
    assert nearest(x, 4).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -1]


@pytest.mark.parametrize("name", EVERY)
def test_codes_are_the_nearest_and_survive_the_round_trip(name: str) -> None:
    """Exhaustive, on the grids of random groups; zero points are whole numbers, so that ends are up to a step away."""
    format = EVERY[name].for_range(4.0)
    W, whole = by_group(weight(), format), format.zero_points != "none"
    grid = format.fit(W, "mse", torch.float16).over_columns()
    found = format.decode(format.encode(W, grid), grid)
    assert torch.equal(format.decode(format.encode(found, grid), grid), found)
    plain = codes_of(EVERY[name]) if not whole else torch.arange(-(1 << format.bits - 1), 1 << format.bits - 1).float()
    known = (plain - grid.zeros[..., None]) * grid.scale[..., None]
    best = (W[..., None] - known).abs().amin(-1)
    torch.testing.assert_close((W - found).abs(), best, rtol=0, atol=1e-6)


def scales(format: NumberFormat, dtype: torch.dtype) -> Iterator[Tensor]:
    for size in (1e-9, 1e-4, 1.0, 100.0):
        W = weight(40) * size
        yield format.for_range(float(W.abs().max())).fit(by_group(W, format), "minmax", dtype).scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mx_scales_are_the_smallest_powers_of_two_that_span_the_group(bits: int, dtype: torch.dtype) -> None:
    format = MxFormat(bits)
    for found in scales(format, dtype):
        assert (torch.frexp(found)[0] == 0.5).all()
    largest = {4: 6.0, 6: 7.5, 8: 448.0}[bits]
    groups = torch.tensor([[largest, 0.0], [largest * 1.01, -1.0], [largest / 2, 0.0], [0.0, 0.0]])
    assert format.fit(groups, "minmax", dtype).scale.tolist() == [1.0, 2.0, 0.5, 1.0]


def test_nvfp4_scales_are_e4m3_numbers_divided_by_a_power_of_two() -> None:
    for largest in (1e-6, 0.013, 1.0, 5000.0):
        format = Nvfp4Format().for_range(largest)
        assert math.frexp(format.global_scale)[0] == 0.5
        assert 112 < largest / 6 * format.global_scale <= 224
    assert Nvfp4Format().for_range(0.0) == Nvfp4Format().for_range(math.inf) == Nvfp4Format()
    format = Nvfp4Format().for_range(4.0)
    found = format.fit(by_group(weight(40) * torch.logspace(-6, 0, 40)[:, None], format), "minmax", torch.float16).scale
    stored = found * format.global_scale
    assert torch.equal(stored.to(torch.float8_e4m3fn).float(), stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", [MxFormat(4), MxFormat(6), MxFormat(8), Nvfp4Format()], ids=str)
def test_products_of_codes_and_scales_are_exact_in_the_stored_type(format: NumberFormat, dtype: torch.dtype) -> None:
    for found in scales(format, dtype):
        product = codes_of(format).double() * found.double()[..., None]
        inside = product.abs() <= torch.finfo(dtype).max
        assert torch.equal(product.to(dtype).double()[inside], product[inside])
        assert torch.equal(product.to(torch.bfloat16).double()[inside], product[inside])


@pytest.mark.parametrize(("name", "search"), only([(name, "hessian") for name in FIXED], product(EVERY, SEARCHES)))
def test_gptq_ends_with_less_loss_than_rounding_to_nearest(name: str, search: str) -> None:
    """Under its own objective tr (Q - W) H (Q - W)'."""
    W = weight(24)
    format, X = EVERY[name].for_range(float(W.abs().max())), weight(256, seed=1) @ weight(128, seed=2)
    H = (X.T @ X).double()
    errors = [
        found.dequantize().double() - W
        for found in (
            gptq(W, H, format, search, torch.float32, 0.01, 128, False).weight,
            rtn(W, format, "mse", torch.float32),
        )
    ]
    ours, plain = (float(((error @ H) * error).sum()) for error in errors)
    assert ours < 0.9 * plain


@pytest.mark.parametrize(("bits", "activations"), [(5, "none"), (4, "int8"), (True, "none")])
def test_other_fields_are_refused(bits: int, activations: str) -> None:
    with pytest.raises(
        ConfigError, match=r"(bits must be one of 4, 6, 8|activations must be one of none, mxfp4, mxfp8), got"
    ):
        MxFormat(bits, activations)  # type: ignore[arg-type]
