"""Oracles: products of whole numbers and powers of two, which are exact in bfloat16; closed forms of the layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from epmq_cli.checkpoint.int4_linear import Int4Linear, for_cuda, kernel_group, obstacle, pairs_of
from epmq_cli.quantize.formats.format import Grid, NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import IntFormat
from tests.helpers.formats import ints
from tests.helpers.gpu import DEVICE

CPU = torch.device("cpu")


def random_weight(format: IntFormat, rows: int = 48, columns: int = 256, device: str = "cpu") -> QuantizedWeight:
    """Random codes, scales that are powers of two of either sign, and zero points if the format has them."""
    generator = torch.Generator().manual_seed(format.bits)
    shape = rows, columns // group_columns(format, columns)

    def integers(*shape: int) -> Tensor:
        return torch.randint(format.lowest, format.highest + 1, shape, generator=generator)

    scale = 2.0 ** torch.randint(-3, 3, shape, generator=generator) * (1 - 2 * (integers(*shape) % 2))
    zero = None if format.zero_points == "none" else integers(*shape).float().to(device)
    codes = integers(rows, columns).to(torch.int8)
    return QuantizedWeight(codes.to(device), Grid(scale.to(device), zero), format, torch.float32)


def inputs(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(9)).float()


def product(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """The result of a kernel that only rounds its outputs."""
    return (x @ weight.dequantize().T).bfloat16().float()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), [(32, 256), (64, 256), (256, 256), (-1, 256), (96, 192), (-1, 96)])
def test_the_kernel_multiplies_with_the_dequantized_weight(
    bits: int, symmetric: bool, group_size: int, columns: int
) -> None:
    weight, x = random_weight(ints(bits, group_size, symmetric), columns=columns), inputs(3, 5, columns)
    bias = nn.Parameter(torch.arange(48.0))
    assert torch.equal(Int4Linear(weight, bias)(x), product(weight, x) + bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_may_have_any_type_and_layout(dtype: torch.dtype) -> None:
    weight = random_weight(ints(4, 64, True))
    linear = Int4Linear(weight, None)
    for x in (inputs(256, 4).T, inputs(4, 3, 256)[:, 1], inputs(256), inputs(0, 256)):
        found = linear(x.to(dtype))
        assert found.dtype == dtype
        assert torch.equal(found.float(), product(weight, x).to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_can_be_cast_to_another_type(dtype: torch.dtype) -> None:
    weight, x = random_weight(ints(4, 64, True)), inputs(4, 256)
    assert torch.equal(Int4Linear(weight, None).to(dtype)(x), product(weight, x))


def test_weights_take_half_a_byte_each_and_four_bytes_per_group() -> None:
    linear = Int4Linear(random_weight(ints(3, 128, True)), None)
    assert sum(tensor.nbytes for tensor in linear.buffers()) == 48 * 256 // 2 + 4 * 48 * 2
    assert list(linear.parameters()) == []
    assert repr(linear) == "Int4Linear(in_features=256, out_features=48, group=128)"


def test_the_even_column_is_the_upper_half_of_a_byte() -> None:
    """Closed form from matrix_to_m16n8k16_Bint4_layout in int4mm.cu."""
    assert pairs_of(torch.tensor([[1, 2, 15, 0]])).tolist() == [[0x12, 0xF0]]


@pytest.mark.parametrize(("columns", "tiles"), [(256, 8), (192, 4), (96, 2)])
def test_cuda_gets_the_largest_tiles_that_fit(columns: int, tiles: int) -> None:
    """Oracle: the shape that torch registers for the meta device."""
    packed = for_cuda(torch.empty(48, columns, dtype=torch.int8, device="meta"))
    assert packed.shape == (6, columns // (16 * tiles), 32, tiles // 2)
    assert packed.dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [256, 192, 96])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_kernel_on_cuda_gives_the_same_outputs(columns: int, symmetric: bool) -> None:
    format, x = ints(4, 32, symmetric), inputs(7, columns)
    found = Int4Linear(random_weight(format, columns=columns, device=DEVICE), None)(x.to(DEVICE))
    torch.testing.assert_close(found.cpu(), product(random_weight(format, columns=columns), x), rtol=2**-6, atol=2**-6)


def test_the_kernels_group_is_the_largest_that_divides() -> None:
    found = {shared: kernel_group(shared) for shared in (32, 96, 128, 768, 1024, 16, 48)}
    assert found == {32: 32, 96: 32, 128: 128, 768: 256, 1024: 256, 16: None, 48: None}


@pytest.mark.parametrize(
    ("bits", "group_size", "shape", "reason"),
    [
        (8, 32, (32, 64), "it has 8 bits, the kernel takes at most 4"),
        (4, 16, (32, 64), "16 input columns share a scale, the kernel takes multiples of 32"),
        (4, -1, (32, 80), "80 input columns share a scale, the kernel takes multiples of 32"),
        (4, 32, (24, 64), "it has 24 outputs, the kernel takes multiples of 16"),
        (2, -1, (16, 96), None),
    ],
)
def test_unsupported_linears_are_reported(
    bits: int, group_size: int, shape: tuple[int, int], reason: str | None
) -> None:
    assert obstacle(ints(bits, group_size), torch.Size(shape), CPU) == reason


def test_the_kernel_supports_integers_only() -> None:
    format: NumberFormat = Fp8Format(-1)
    assert obstacle(format, torch.Size((16, 96)), CPU) == "its format is fp8, the kernel takes integers"
