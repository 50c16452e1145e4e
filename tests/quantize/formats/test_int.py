"""Oracles: closed form on hand-made weights, and invariants of rounding."""

import pytest
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.int import BITS, GridSpec, QuantizedWeight, find_grid, quantize, widths_of
from epmq_cli.quantize.rtn import Rtn, rtn


def weight(rows: int = 6, columns: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_symmetric_minmax_scale_is_the_closed_form() -> None:
    grid = find_grid(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), GridSpec(4, 2, True, "minmax"), torch.float32)
    torch.testing.assert_close(grid.scale, torch.tensor([[6 / 15, 4 / 15]]))
    assert not grid.zero.any()


def test_asymmetric_minmax_spans_the_range() -> None:
    spec = GridSpec(4, -1, False, "minmax")
    row = torch.tensor([[0.0, 1.0, 7.5]])
    grid = find_grid(row, spec, torch.float32)
    torch.testing.assert_close(grid.scale, torch.tensor([[0.5]]))
    assert grid.zero.item() == -8
    assert quantize(row, grid.scale, grid.zero, spec).tolist() == [[-8.0, -6.0, 7.0]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 4])
def test_integers_stay_on_the_grid_and_errors_within_half_a_step(bits: int, symmetric: bool, group_size: int) -> None:
    found = rtn(weight(), GridSpec(bits, group_size, symmetric, "minmax"), torch.float32)
    assert found.values.min() >= -(2 ** (bits - 1))
    assert found.values.max() <= 2 ** (bits - 1) - 1
    steps = found.scale.repeat_interleave(8 // found.scale.shape[1], 1)
    # a symmetric grid ends half a step short of the largest value; zero points are whole numbers
    assert ((found.dequantize() - weight()).abs() <= steps * (0.5 if symmetric else 1.0) + 1e-6).all()


def test_mse_search_never_does_worse_than_minmax_in_any_group() -> None:
    for symmetric in (True, False):
        errors = [
            (rtn(weight(32, 64), GridSpec(3, 16, symmetric, search), torch.float32).dequantize() - weight(32, 64))
            .square()
            .reshape(32, 4, 16)
            .sum(2)
            for search in ("mse", "minmax")
        ]
        assert (errors[0] <= errors[1]).all()
        assert errors[0].sum() < 0.95 * errors[1].sum()


def test_scales_are_exact_in_the_type_they_are_stored_in() -> None:
    grid = find_grid(weight(), GridSpec(4, 4, True, "mse"), torch.float16)
    assert torch.equal(grid.scale, grid.scale.half().float())


def test_weights_that_are_zero_or_too_small_for_half_precision_stay_finite() -> None:
    tiny = torch.cat([torch.zeros(1, 4), torch.full((1, 4), 1e-30)])
    found = rtn(tiny, GridSpec(4, -1, True, "mse"), torch.float16)
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    assert not found.dequantize().any()


def test_weights_on_a_grid_survive_rounding_unchanged() -> None:
    spec = GridSpec(4, 4, True, "minmax")
    once = rtn(weight(), spec, torch.float32)
    again = quantize(once.dequantize().reshape(6, 2, 4), once.scale[:, :, None], once.zero[:, :, None], spec)
    assert torch.equal(again.reshape(6, 8).to(torch.int8), once.values)


def test_split_is_the_inverse_of_stacking_rows() -> None:
    whole = rtn(weight(), GridSpec(4, 4, False, "mse"), torch.float32)
    parts = whole.split([1, 2, 3])
    assert all(isinstance(part, QuantizedWeight) for part in parts)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((5, 64, True, "mse"), "bits must be one of 2, 3, 4, 8, got 5"),
        ((True, 64, True, "mse"), "bits must be one of"),
        (("4", 64, True, "mse"), "bits must be one of"),
        ((4, 0, True, "mse"), "group_size must be"),
        ((4, -2, True, "mse"), "group_size must be"),
        ((4, 6.5, True, "mse"), "group_size must be"),
        ((4, 64, "yes", "mse"), "quant.symmetric must be one of"),
        ((4, 64, 1, "mse"), "quant.symmetric must be one of"),
        ((4, 64, True, "best"), "quant.grid must be one of minmax, mse, hessian, got 'best'"),
    ],
)
def test_bad_specs_are_refused(fields: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GridSpec(*fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bits", "widths"), [(2, (2,)), (8, (8,)), (3.0, (3,)), (2.5, (2, 3)), (3.25, (3, 4)), (5, (4, 8)), (7.9, (4, 8))]
)
def test_widths_are_the_one_asked_for_or_its_neighbours(bits: float, widths: tuple[int, ...]) -> None:
    assert widths_of(bits, symmetric=True) == widths


@pytest.mark.parametrize("bits", [1, 9, 1.5, 8.5, True, "4", "some", None, float("nan")])
def test_other_widths_are_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match="bits must be one of 2, 3, 4, 8, or a number between them for a mix"):
        widths_of(bits, symmetric=True)


def test_a_mix_needs_symmetric_grids() -> None:
    with pytest.raises(ConfigError, match=r"bits must be one of 2, 3, 4, 8 with quant.symmetric=false, got 3.5"):
        Rtn(3.5, 64, False, "mse")


def test_rtn_looks_at_no_inputs() -> None:
    with pytest.raises(ConfigError, match="quant.grid must be one of minmax, mse, got 'hessian'"):
        Rtn(4, 64, True, "hessian")
