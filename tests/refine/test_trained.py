"""Oracle: gradients of torch through scales, and the quantized weight itself."""

from __future__ import annotations

import pytest
import torch

from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight, by_group
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.refine.trained import UNIT, DenseTensors, LowRankUpdates, PackedTensors, RoundedTensors

FORMATS = [
    (IntFormat(2, 4, "none"), torch.float32),
    (IntFormat(3, 4, "whole"), torch.bfloat16),
    (IntFormat(4, -1, "real"), torch.float16),
    (Fp8Format(4), torch.bfloat16),
]
NAME, OTHER = "linear.weight", "norm.weight"


def packed(format: NumberFormat, dtype: torch.dtype, kind: type[PackedTensors] = PackedTensors) -> PackedTensors:
    groups = by_group(torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), format)
    grid = format.fit(groups, "minmax", dtype)
    codes = format.encode(groups, grid.over_columns()).reshape(6, 16)
    return kind({NAME: QuantizedWeight(codes, grid, format, dtype)}, dtype)


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_it_starts_at_the_weight_and_keeps_the_codes(format: NumberFormat, dtype: torch.dtype) -> None:
    trained = packed(format, dtype)
    weight = trained._weights[NAME]
    start = trained.start(NAME, weight.dequantize())
    assert start.shape == weight.grid.scale.shape
    assert torch.equal(trained.tensor(NAME, start), weight.dequantize())
    moved = weight.rescaled(1.5 * start)
    assert moved.codes is weight.codes
    assert torch.equal(moved.grid.scale, (1.5 * weight.grid.scale).to(dtype).float())
    assert torch.equal(trained.tensor(NAME, 1.5 * start), moved.dequantize())
    assert torch.equal(weight.rescaled(0 * start).grid.scale, weight.grid.scale)


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_the_gradient_of_the_factors_is_torchs(format: NumberFormat, dtype: torch.dtype) -> None:
    trained = packed(format, dtype)
    weight = trained._weights[NAME]
    slope = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    factors = torch.ones_like(weight.grid.scale).requires_grad_()
    (slope * (by_group(weight.dequantize(), format) * factors[..., None]).reshape(6, 16)).sum().backward()
    torch.testing.assert_close(trained.gradient(NAME, slope, factors.detach()), factors.grad)


def test_other_tensors_are_rounded_to_the_stored_type() -> None:
    trained, tensor = packed(*FORMATS[1]), torch.tensor([1.001, 2.0, 0.3])
    start = trained.start(OTHER, tensor)
    assert torch.equal(start, tensor)
    assert torch.equal(trained.tensor(OTHER, start), tensor.bfloat16().float())
    assert trained.gradient(OTHER, tensor, start) is tensor


def test_dense_tensors_are_trained_themselves() -> None:
    tensor = torch.randn(3)
    start = DenseTensors().start(NAME, tensor)
    assert torch.equal(start, tensor)
    assert start.data_ptr() != tensor.data_ptr()
    assert DenseTensors().tensor(NAME, tensor) is tensor
    assert DenseTensors().gradient(NAME, tensor, tensor) is tensor


def test_an_update_of_low_rank_starts_at_the_tensor() -> None:
    tensor, trained = torch.randn(6, 4), LowRankUpdates([NAME], 2, 3)
    start = trained.start(NAME, tensor)
    assert start.shape == (2, 10)
    assert torch.equal(trained.tensor(NAME, start), tensor)
    assert torch.equal(start, LowRankUpdates([NAME], 2, 3).start(NAME, tensor))
    assert torch.equal(trained.start(OTHER, tensor), tensor)
    assert torch.equal(trained.tensor(OTHER, 2 * tensor), 2 * tensor)


def test_the_gradient_of_an_update_is_torchs() -> None:
    tensor, slope, trained = torch.randn(6, 4), torch.randn(6, 4), LowRankUpdates([NAME], 2, 3)
    numbers = (trained.start(NAME, tensor) + 0.1 * torch.randn(2, 10)).requires_grad_()
    (slope * trained.tensor(NAME, numbers)).sum().backward()
    torch.testing.assert_close(trained.gradient(NAME, slope, numbers.detach()), numbers.grad)
    assert torch.linalg.matrix_rank(trained.tensor(NAME, numbers.detach()) - tensor) == 2


@pytest.mark.parametrize(("format", "dtype"), FORMATS[:3])
def test_codes_move_by_steps_and_stay_on_the_grid(format: IntFormat, dtype: torch.dtype) -> None:
    trained = packed(format, dtype, RoundedTensors)
    weight = trained._weights[NAME]
    start = trained.start(NAME, weight.dequantize())
    assert torch.equal(trained.tensor(NAME, start), weight.dequantize())
    moved = trained.weight(NAME, start + 1.2 / UNIT)
    assert torch.equal(moved.codes, (weight.codes + 1).clamp(format.lowest, format.highest))
    assert moved.codes.dtype == weight.codes.dtype
    assert moved.grid is weight.grid
    assert torch.equal(trained.weight(NAME, start - 0.4 / UNIT).codes, weight.codes)


@pytest.mark.parametrize(("format", "dtype"), FORMATS[:3])
def test_the_gradient_of_codes_is_torchs_without_rounding(format: IntFormat, dtype: torch.dtype) -> None:
    trained = packed(format, dtype, RoundedTensors)
    weight, generator = trained._weights[NAME], torch.Generator().manual_seed(2)
    slope, offsets = torch.randn(6, 16, generator=generator), torch.randn(6, 16, generator=generator) / UNIT
    numbers = offsets.clone().requires_grad_()
    positions = (weight.codes + UNIT * numbers).clamp(format.lowest - 0.5, format.highest + 0.5)
    (slope * format.decode(by_group(positions, format), weight.grid.over_columns()).reshape(6, 16)).sum().backward()
    torch.testing.assert_close(trained.gradient(NAME, slope, offsets), numbers.grad)
