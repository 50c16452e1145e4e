"""Oracles: closed forms on hand-made weights, and invariants of rounding."""

import pytest
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import Grid, NumberFormat, QuantizedWeight, ZeroPoints, by_group
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import BITS, IntFormat
from epmq_cli.quantize.rtn import Rtn, rtn
from tests.helpers.formats import ints


def weight(rows: int = 6, columns: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_symmetric_minmax_scale_is_the_closed_form() -> None:
    format = ints(4, 2)
    grid = format.fit(by_group(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), format), "minmax", torch.float32)
    torch.testing.assert_close(grid.scale, torch.tensor([[6 / 15, 4 / 15]]))
    assert grid.zero is None


def test_asymmetric_minmax_spans_the_range() -> None:
    found = rtn(torch.tensor([[0.0, 1.0, 7.5]]), ints(4, -1, False), "minmax", torch.float32)
    torch.testing.assert_close(found.grid.scale, torch.tensor([[0.5]]))
    assert found.grid.zeros.item() == -8
    assert found.codes.tolist() == [[-8, -6, 7]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 4])
def test_integers_stay_on_the_grid_with_errors_of_half_a_step_at_most(
    bits: int, symmetric: bool, group_size: int
) -> None:
    found = rtn(weight(), ints(bits, group_size, symmetric), "minmax", torch.float32)
    assert found.codes.min() >= -(2 ** (bits - 1))
    assert found.codes.max() <= 2 ** (bits - 1) - 1
    steps = found.grid.scale.repeat_interleave(8 // found.grid.scale.shape[1], 1)
    # a symmetric grid ends half a step short of the largest value; zero points are whole numbers
    assert ((found.dequantize() - weight()).abs() <= steps * (0.5 if symmetric else 1.0) + 1e-6).all()


def test_mse_search_is_never_worse_than_minmax() -> None:
    for symmetric in (True, False):
        errors = [
            (rtn(weight(32, 64), ints(3, 16, symmetric), search, torch.float32).dequantize() - weight(32, 64))
            .square()
            .reshape(32, 4, 16)
            .sum(2)
            for search in ("mse", "minmax")
        ]
        assert (errors[0] <= errors[1]).all()
        assert errors[0].sum() < 0.95 * errors[1].sum()


def test_scales_are_exact_in_their_stored_type() -> None:
    scale = rtn(weight(), ints(4, 4), "mse", torch.float16).grid.scale
    assert torch.equal(scale, scale.half().float())


def test_weights_that_are_zero_or_too_small_for_half_precision_stay_finite() -> None:
    tiny = torch.cat([torch.zeros(1, 4), torch.full((1, 4), 1e-30)])
    found = rtn(tiny, ints(4, -1, True), "mse", torch.float16)
    assert torch.isfinite(found.grid.scale).all()
    assert (found.grid.scale > 0).all()
    assert not found.dequantize().any()


def test_weights_on_a_grid_survive_rounding_unchanged() -> None:
    format = ints(4, 4)
    once = rtn(weight(), format, "minmax", torch.float32)
    again = format.encode(by_group(once.dequantize(), format), once.grid.over_columns())
    assert torch.equal(again.reshape(6, 8), once.codes)


def test_split_is_the_inverse_of_stacking_rows() -> None:
    whole = rtn(weight(), ints(4, 4, False), "mse", torch.float32)
    parts = whole.split([1, 2, 3])
    assert all(isinstance(part, QuantizedWeight) for part in parts)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())


@pytest.mark.parametrize("zero_points", ["none", "whole", "real"])
def test_every_code_survives_the_round_trip(zero_points: ZeroPoints) -> None:
    """Exhaustive: all bits, scales of either sign and every integer or half-integer zero point."""
    for bits in BITS:
        format = IntFormat(bits, -1, zero_points)
        codes = torch.arange(format.lowest, format.highest + 1, dtype=torch.int8)
        points = codes[:: max(1, len(codes) // 16), None].float() + (0.5 if zero_points == "real" else 0.0)
        for scale in (0.5, -0.25):
            grid = Grid(torch.full_like(points, scale), None if zero_points == "none" else points)
            found = format.encode(format.decode(codes[None], grid), grid)
            assert torch.equal(found, codes.expand_as(found))


@pytest.mark.parametrize("zero_points", ["none", "whole", "real"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_is_the_nearest(bits: int, zero_points: ZeroPoints) -> None:
    """Exhaustive."""
    format, W = IntFormat(bits, -1, zero_points), weight(20, 32)
    grid = format.fit(by_group(W, format), "mse", torch.float32).over_columns()
    codes = torch.arange(format.lowest, format.highest + 1, dtype=torch.int8)
    known = format.decode(codes[None, None], grid)
    found = format.decode(format.encode(by_group(W, format), grid), grid)
    nearest = (by_group(W, format)[..., None] - known[:, :, None]).abs().amin(-1)
    torch.testing.assert_close((by_group(W, format) - found).abs(), nearest, rtol=0, atol=1e-6)


def test_real_zero_points_span_the_range_exactly() -> None:
    """The smallest weight has the smallest code and the largest weight the largest; integer zero points miss this."""
    format, W = IntFormat(4, -1, "real"), weight() + 0.3
    found = rtn(W, format, "minmax", torch.float32)
    assert (found.codes.amin(1) == -8).all()
    assert (found.codes.amax(1) == 7).all()
    torch.testing.assert_close(found.dequantize().amin(1), W.amin(1))
    torch.testing.assert_close(found.dequantize().amax(1), W.amax(1))
    assert (found.grid.zeros != found.grid.zeros.round()).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((9, 64, "none"), "bits must be one of 2, 3, 4, 5, 6, 7, 8, got 9"),
        ((True, 64, "none"), "bits must be one of"),
        (("4", 64, "none"), "bits must be one of"),
        ((4, 0, "none"), "group_size must be"),
        ((4, -2, "none"), "group_size must be"),
        ((4, 6.5, "none"), "group_size must be"),
        ((4, 64, "half"), "zero_points must be one of none, whole, real, got 'half'"),
    ],
)
def test_bad_fields_are_refused(fields: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IntFormat(*fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", [ints(4, 64), Fp8Format(-1)], ids=repr)
def test_rtn_does_not_depend_on_inputs(format: NumberFormat) -> None:
    with pytest.raises(ConfigError, match="quant.grid must be one of minmax, mse, got 'hessian'"):
        Rtn(format, "hessian")
