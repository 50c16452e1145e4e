"""Oracles: the nearest of all 256 codes, torch's own cast, compressed-tensors' own compressor, and closed forms."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import Grid, QuantizedWeight, by_group
from epmq_cli.quantize.formats.fp8 import LARGEST, Fp8Format
from epmq_cli.quantize.gptq import gptq

ONE = Grid(torch.ones(1), None)


def weight(rows: int = 6, columns: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def codes() -> Tensor:
    """All codes except NaN, as torch interprets their bits."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return every[~every.float().isnan()]


def test_all_253_numbers_survive_the_round_trip() -> None:
    """There are 254 codes; two of them are 0."""
    found = Fp8Format(-1).encode(codes().float(), ONE)
    assert len(codes()) == 254
    assert len(set(codes().float().tolist())) == 253
    assert torch.equal(found.view(torch.uint8), codes().view(torch.uint8))


def test_every_code_is_the_nearest() -> None:
    """Exhaustive. Compares distances, because halfway between two codes both are nearest."""
    known = codes().double().sort().values
    between = (known[:-1] + known[1:]) / 2
    x = torch.cat([weight(40, 100).flatten() * 3, weight(40, 100).flatten() * 200, between.float(), known.float()])
    format = Fp8Format(-1)
    found = format.decode(format.encode(x, ONE), ONE).double()
    nearest = (x.double()[:, None] - known).abs().amin(1)
    assert torch.equal((x.double() - found).abs(), nearest)


def test_encode_equals_the_cast_of_torch_and_saturates_at_448() -> None:
    x = torch.cat([weight().flatten() * 100, torch.tensor([448.0, -448.0, 463.0, 1e6, -1e30])])
    found = Fp8Format(-1).encode(x, ONE)
    inside = x.abs() <= LARGEST
    assert torch.equal(found[inside].float(), x[inside].to(torch.float8_e4m3fn).float())
    assert found[~inside].float().tolist() == [448.0, 448.0, -448.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_it_matches_compressed_tensors(group_size: int, dtype: torch.dtype) -> None:
    """Oracle: the compressor of float-quantized, given the same scales."""
    format, W = Fp8Format(group_size), weight().to(dtype).float()
    grid = format.fit(by_group(W, format), "minmax", dtype)
    found = format.encode(by_group(W, format), grid.over_columns()).reshape(W.shape)
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, type="float", **strategy))
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    theirs = compressor.compress({"weight": W, "weight_scale": grid.scale}, scheme)
    assert torch.equal(found.view(torch.uint8), theirs["weight"].view(torch.uint8))
    read = compressor.decompress({"weight": found, "weight_scale": grid.scale.to(dtype)}, scheme)["weight"]
    own = format.decode(by_group(found, format), grid.over_columns()).to(dtype).reshape(W.shape)
    assert torch.equal(own, read)


def test_the_largest_weight_of_a_group_has_the_largest_code() -> None:
    format, W = Fp8Format(8), weight()
    grid = format.fit(by_group(W, format), "minmax", torch.float32)
    torch.testing.assert_close(grid.scale, by_group(W, format).abs().amax(-1) / 448)
    assert grid.zero is None
    found = format.encode(by_group(W, format), grid.over_columns())
    assert (found.float().abs().amax(-1) == 448).all()


def test_errors_are_at_most_half_a_step() -> None:
    """Three mantissa bits: at most 2^-4 of the weight; below 2^-6 of the scale at most half of 2^-9."""
    format, W = Fp8Format(-1), weight(20, 64)
    grid = format.fit(by_group(W, format), "minmax", torch.float32).over_columns()
    error = (format.decode(format.encode(by_group(W, format), grid), grid) - by_group(W, format)).abs()
    assert (error <= torch.maximum(by_group(W, format).abs() * 2**-4, grid.scale * 2**-10) * (1 + 1e-5)).all()


def test_mse_search_is_never_worse_than_minmax() -> None:
    format, W = Fp8Format(16), weight(32, 64)
    lost = []
    for search in ("mse", "minmax"):
        grid = format.fit(by_group(W, format), search, torch.float32).over_columns()
        error = format.decode(format.encode(by_group(W, format), grid), grid) - by_group(W, format)
        lost.append(error.square().sum(-1))
    assert (lost[0] <= lost[1]).all()
    assert lost[0].sum() < 0.95 * lost[1].sum()


def test_rows_of_zeros_or_of_tiny_weights_stay_finite() -> None:
    format, tiny = Fp8Format(-1), torch.cat([torch.zeros(1, 4), torch.full((1, 4), 1e-30)])
    grid = format.fit(by_group(tiny, format), "mse", torch.float16)
    assert grid.scale[0] == 1
    assert grid.scale[1] == torch.finfo(torch.float16).tiny
    assert not format.decode(format.encode(by_group(tiny, format), grid.over_columns()), grid.over_columns()).any()


def test_rows_of_a_block_share_the_scale_of_the_largest_weight_among_them() -> None:
    format, W = Fp8Format(128, "fp8_group", 128), weight(300, 256)
    found = format.fit(by_group(W, format), "minmax", torch.float32).scale
    for rows in (slice(0, 128), slice(128, 256), slice(256, 300)):
        for group in range(2):
            wanted = W[rows, 128 * group : 128 * (group + 1)].abs().max() / LARGEST
            torch.testing.assert_close(found[rows, group], wanted.expand(len(W[rows])))


@pytest.mark.parametrize("search", ["mse", "hessian"])
def test_searched_scales_are_those_with_the_least_error_of_a_whole_block(search: str) -> None:
    """Rows of very different sizes: what is best for one row is not what is best for the block."""
    format, W = Fp8Format(128, "fp8_group", 128), weight(200, 128) * torch.logspace(-2, 0, 200)[:, None]
    H = torch.eye(128, dtype=torch.float64)
    found = gptq(W, H, format, search, torch.float32, 0.01, 128, False).weight
    assert isinstance(found, QuantizedWeight)
    for rows in (slice(0, 128), slice(128, 200)):
        assert len(found.grid.scale[rows].unique()) == 1
        least = (found.dequantize()[rows] - W[rows]).square().sum()
        for factor in (1.0, 0.9, 0.8):
            scale = (W[rows].abs().max() * factor / LARGEST).expand(len(W[rows]), 1)
            grid = Grid(scale[..., None], None)
            other = format.decode(format.encode(by_group(W[rows], format), grid), grid)
            assert least <= (other[:, 0] - W[rows]).square().sum() * 1.0001


def test_the_scale_of_static_inputs_is_that_of_the_largest_input() -> None:
    assert Fp8Format(-1, "fp8_static").for_inputs(896.0) == Fp8Format(-1, "fp8_static", 1, 2.0)
    assert Fp8Format(-1, "fp8_static", 1, 2.0).for_inputs(0.0) == Fp8Format(-1, "fp8_static")
    assert Fp8Format(-1, "fp8").for_inputs(896.0) == Fp8Format(-1, "fp8")


@pytest.mark.parametrize("group_size", [0, -2, 1.5, True, "64"])
def test_other_group_sizes_are_refused(group_size: object) -> None:
    with pytest.raises(ConfigError, match="group_size must be a whole number of input columns above 0, or -1"):
        Fp8Format(group_size)  # type: ignore[arg-type]
