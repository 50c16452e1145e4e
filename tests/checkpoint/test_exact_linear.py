"""Oracle: a dense linear with the dequantized weight, bit for bit; closed form of the packed codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from epmq_cli.checkpoint import exact_linear
from epmq_cli.checkpoint.exact_linear import ExactLinear, from_halves, in_halves
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.names import FIXED
from epmq_cli.quantize.rtn import rtn
from tests.helpers.formats import ints

ROWS = 10
INTEGERS = [ints(bits, size, symmetric) for bits in range(2, 9) for size in (16, -1) for symmetric in (True, False)]
OTHERS = [Fp8Format(-1), Fp8Format(32), *FIXED.values()]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def made(format: NumberFormat, dtype: torch.dtype, columns: int = 96) -> tuple[ExactLinear, nn.Linear]:
    """A packed linear, and the dense linear with the same weight."""
    generator = torch.Generator().manual_seed(0)
    weight = rtn(torch.randn(ROWS, columns, generator=generator), format, "minmax", dtype)
    dense = nn.Linear(columns, ROWS)
    dense.weight.data = weight.dequantize()
    return ExactLinear(weight, dense.bias), dense


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("format", [*INTEGERS, *OTHERS], ids=lambda format: f"{format}")
def test_outputs_are_those_of_the_dequantized_weight(format: NumberFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_linear, "AT_ONCE", 3 * 128)  # three rows at once, one at the end
    for dtype in DTYPES:
        packed, dense = made(format, dtype, 128)
        for x in (inputs(128), inputs(2, 3, 128)):
            assert torch.equal(packed(x), dense(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cast_of_the_model_does_not_round_scales(dtype: torch.dtype) -> None:
    packed, dense = made(ints(4, 16), torch.float32)
    packed, dense = packed.to(dtype), dense.to(dtype)
    x = inputs(5, 96).to(dtype)
    found = packed(x)
    assert found.dtype == dtype
    assert torch.equal(found, dense(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_odd_number_of_inputs(bits: int) -> None:
    packed, dense = made(ints(bits, -1, False), torch.float16, 33)
    assert torch.equal(packed(inputs(2, 33)), dense(inputs(2, 33)))


@pytest.mark.parametrize(("bits", "codes"), [(3, 48), (4, 48), (5, 96)])
def test_weights_stay_packed(bits: int, codes: int) -> None:
    """Half a byte a code up to 4 bits, two bytes a scale and one a zero point."""
    packed, _ = made(ints(bits, 32, False), torch.float16)
    assert sum(buffer.nbytes for buffer in packed.buffers()) == ROWS * (codes + 3 * (2 + 1))
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    assert repr(packed) == f"ExactLinear(in_features=96, out_features=10, format=int{bits})"


def test_a_byte_holds_a_column_of_each_half() -> None:
    codes = torch.tensor([[-8, 7, 1, -1]], dtype=torch.int8)
    assert in_halves(codes).tolist() == [[0x18, 0xF7]]
    assert torch.equal(from_halves(in_halves(codes)), codes)
