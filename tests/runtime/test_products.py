"""Products in float32 by the faster library are as exact as torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from epmq_cli.models.fast_linears import FastLinear, fast_linears
from epmq_cli.runtime import products
from epmq_cli.runtime.products import exact_products, fast_products

CHOICE = products._onednn_is_faster.__wrapped__


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(products, "_devices", set())
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: products._error() < products.ERROR)
    exact_products(torch.device("cpu"))
    yield
    assert torch.get_float32_matmul_precision() == "highest"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 3, 64, 257])
@pytest.mark.parametrize("width", [8, 200, 1024])
def test_products_are_exact_in_float32(rows: int, width: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(rows, width), torch.randn(width, 96)
    linear = nn.Linear(width, 96)
    with torch.inference_mode():
        with fast_products():
            assert relative(a @ b, a.double() @ b.double()) < products.ERROR
        with fast_linears(linear):
            assert type(linear) is FastLinear
            found = linear(a)
    assert type(linear) is nn.Linear
    assert relative(found, a.double() @ linear.weight.detach().double().T + linear.bias.detach().double()) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_a_linear(bias: bool) -> None:
    torch.manual_seed(0)
    linear, rows = nn.Linear(40, 24, bias=bias), torch.randn(3, 7, 40, requires_grad=True)
    leaves = [rows, *linear.parameters()]
    expected = torch.autograd.grad(linear(rows).square().sum(), leaves)
    with fast_linears(linear):
        loss = linear(rows).square().sum()
    for own, other in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(own, other)


def test_a_linear_in_autocast_computes_in_its_type() -> None:
    linear = nn.Linear(8, 4)
    with fast_linears(linear), torch.autocast("cpu", torch.bfloat16):
        output = linear(torch.ones(2, 8))
    assert output.dtype is torch.bfloat16
    output.float().sum().backward()
    assert linear.weight.grad is not None


def test_torchs_precision_is_restored_after_an_error() -> None:
    with pytest.raises(ValueError, match="inside"), fast_products():
        assert torch.get_float32_matmul_precision() in ("highest", "medium")
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_for_a_gpu_are_never_in_tf32() -> None:
    exact_products(torch.device("cuda"))
    with fast_products():
        assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_a_library_that_rounds_to_bfloat16_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_error", lambda: 2e-3)
    assert not CHOICE()
