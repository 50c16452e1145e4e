"""Oracles: the quantizer's own weight, and gradients of torch through a rounding with the gradient 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from epmq_cli.quantize.formats.format import Grid, QuantizedWeight, by_group
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.rounding import LearnedRounding, LearnedVector, RoundingOptions

OUT, IN, GROUP = 6, 16, 4
FORMATS = [
    (IntFormat(bits, GROUP, zeros), dtype)
    for bits, zeros, dtype in (
        (2, "none", torch.float32),
        (3, "whole", torch.bfloat16),
        (4, "real", torch.float32),
        (8, "none", torch.float16),
    )
]


def quantized(format: IntFormat, dtype: torch.dtype) -> tuple[QuantizedWeight, Tensor]:
    """A weight with random codes, and a target that is often nearer to other codes."""
    generator = torch.Generator().manual_seed(format.bits)
    shape = (OUT, IN // GROUP)
    codes = torch.randint(format.lowest, format.highest + 1, (OUT, IN), generator=generator).to(torch.int8)
    scale = (0.1 + torch.rand(shape, generator=generator)).to(dtype).float()
    zero = None
    if format.zero_points == "none":
        scale[::2] *= -1  # grid=hessian has such scales
    else:
        zero = torch.rand(shape, generator=generator) if format.zero_points == "real" else torch.ones(shape)
    weight = QuantizedWeight(codes, Grid(scale, zero), format, dtype)
    return weight, weight.dequantize() + torch.randn(OUT, IN, generator=generator)


def options(**own: Any) -> RoundingOptions:
    return RoundingOptions(**{"lr": 0.2, "reach": 0.6, "scale_lr": 0.02, "clip": (0.5, 1.1), **own})


def through(x: Tensor) -> Tensor:
    """Rounds; its gradient is 1."""
    return x + (x.round() - x).detach()


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_it_starts_at_the_quantizers_weight(format: IntFormat, dtype: torch.dtype) -> None:
    weight, target = quantized(format, dtype)
    found = LearnedRounding(weight, target, options()).weight()
    assert torch.equal(found.codes, weight.codes)
    assert found.codes.dtype == weight.codes.dtype
    assert torch.equal(found.grid.scale, weight.grid.scale)
    assert found.grid.zero is weight.grid.zero
    assert torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_steps_go_against_the_gradient_through_the_rounding(format: IntFormat, dtype: torch.dtype) -> None:
    weight, target = quantized(format, dtype)
    learned = LearnedRounding(weight, target, options())
    grid, generator = weight.grid.over_columns(), torch.Generator().manual_seed(1)
    codes = by_group(weight.codes, format).float()
    steps = codes - grid.zeros + (by_group(target, format) / grid.scale - codes + grid.zeros).clamp(-0.25, 0.25)
    offsets, factors = torch.zeros_like(steps), torch.ones_like(grid.scale)
    for _ in range(20):
        v, m = offsets.clone().requires_grad_(), factors.clone().requires_grad_()
        rounded = through(steps + v + grid.zeros).clamp(format.lowest - 0.5, format.highest + 0.5)
        q = rounded + (rounded.detach().clamp(format.lowest, format.highest) - rounded.detach())
        direction = torch.randn(OUT, IN, generator=generator) + 0.5
        (by_group(direction, format) * grid.scale * m * (q - grid.zeros)).sum().backward()
        exact = (grid.scale * factors).to(dtype).float() * (q.detach() - grid.zeros)
        torch.testing.assert_close(learned.value(), exact.to(dtype).float().reshape(OUT, IN))
        learned.step(direction, 0.5)
        assert v.grad is not None
        assert m.grad is not None
        offsets = (offsets - 0.1 * v.grad.sign()).clamp(-0.6, 0.6)
        factors = (factors - 0.01 * m.grad.sign()).clamp(0.5, 1.1)
        torch.testing.assert_close(learned.state(), (offsets, factors))
    assert not torch.equal(learned.weight().codes, weight.codes)


def test_numbers_stay_within_their_limits() -> None:
    weight, target = quantized(*FORMATS[0])
    learned, start = LearnedRounding(weight, target, options(lr=0.4, scale_lr=0.3, clip=(0.8, 1.1))), weight.codes.int()
    before = learned.state()
    for direction in (torch.ones(OUT, IN), -torch.ones(OUT, IN)):
        for _ in range(5):
            learned.step(direction, 1)
        offsets, factors = learned.state()
        assert offsets.abs().max() <= 0.6
        assert 0.8 <= factors.min() <= factors.max() <= 1.1
    learned = LearnedRounding(weight, target, options(lr=0.4, scale_lr=0))
    for _ in range(5):
        learned.step(torch.ones(OUT, IN), 1)
    assert (learned.weight().codes.int() - start).abs().max() == 1
    assert torch.equal(learned.weight().grid.scale, weight.grid.scale)
    learned.restore(before)
    assert torch.equal(learned.weight().codes, weight.codes)


def test_tiny_scales_stay_normal_numbers() -> None:
    tiny = torch.finfo(torch.float16).tiny
    format = IntFormat(4, -1, "none")
    weight = QuantizedWeight(
        torch.ones(1, 4, dtype=torch.int8), Grid(torch.full((1, 1), tiny), None), format, torch.float16
    )
    learned = LearnedRounding(weight, weight.dequantize(), options(lr=0, scale_lr=0.2))
    learned.step(torch.ones(1, 4), 1)
    assert float(learned.weight().grid.scale) >= tiny


def test_vectors_move_by_their_mean_size() -> None:
    start = torch.tensor([3.0, -4.0, 0.0])
    learned = LearnedVector(start, 0.1, torch.float32)
    assert torch.equal(learned.value(), start)
    learned.step(torch.tensor([2.0, -1e-9, 0.0], dtype=torch.float64), 0.5)
    size = (25 / 3) ** 0.5
    torch.testing.assert_close(learned.value(), start + 0.05 * size * torch.tensor([-1.0, 1.0, 0.0]))
    assert torch.equal(LearnedVector(start / 3, 0.1, torch.bfloat16).value(), start / 3)  # as it was
    zero = LearnedVector(torch.zeros(2), 0.1, torch.float32, added=2.0)
    zero.step(torch.ones(2), 1)
    torch.testing.assert_close(zero.value(), torch.full((2,), -0.2))
