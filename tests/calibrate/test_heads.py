"""Oracles: least squares, and invariants; all in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.heads import solved_head
from epmq_cli.calibrate.quadratic import Affine

CLASSES, WIDTH = 3, 8


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(biased: bool = True) -> Affine:
    return Affine(rand(CLASSES, WIDTH, seed=1), rand(CLASSES, seed=2) if biased else None)


@pytest.mark.parametrize("biased", [True, False])
def test_without_anchor_the_head_is_least_squares_to_the_experts_logits(biased: bool) -> None:
    own, teacher, given = rand(40, WIDTH, seed=3), rand(40, WIDTH, seed=4), head(biased)
    logits = teacher @ given.weight.T + (0 if given.bias is None else given.bias)
    inputs = torch.cat([own, torch.ones(40, 1, dtype=own.dtype)], 1) if biased else own
    direct = torch.linalg.lstsq(inputs, logits).solution.T
    found = solved_head([own], [teacher], given, 0.0)
    torch.testing.assert_close(found.weight, direct[:, :WIDTH])
    if biased:
        torch.testing.assert_close(found.bias, direct[:, WIDTH])


def test_the_experts_own_features_keep_the_head_bit_for_bit() -> None:
    own, given = rand(40, WIDTH, seed=3), head()
    found = solved_head([own], [own], given, 0.01)
    assert torch.equal(found.weight, given.weight)
    assert torch.equal(found.bias, given.bias)  # type: ignore[arg-type]


def test_a_strong_anchor_keeps_the_head() -> None:
    found = solved_head([rand(40, WIDTH, seed=3)], [rand(40, WIDTH, seed=4)], head(), 1e9)
    torch.testing.assert_close(found.weight, head().weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.bias, head().bias, rtol=1e-6, atol=1e-6)


def test_the_anchor_is_the_ridge_of_objective_py() -> None:
    own, teacher, given, lam = rand(40, WIDTH, seed=3), rand(40, WIDTH, seed=4), head(), 0.03
    found = solved_head([own], [teacher], given, lam)
    assert given.bias is not None
    assert found.bias is not None
    W, b = (tensor.clone().requires_grad_() for tensor in (found.weight, found.bias))
    error = own @ W.T + b - teacher @ given.weight.T - given.bias
    loss = error.square().sum() / torch.linalg.norm(own.T @ own)
    loss = loss + lam * ((W - given.weight).square().sum() + (b - given.bias).square().sum())
    for gradient in torch.autograd.grad(loss, [W, b]):
        assert gradient.abs().max() < 1e-12


def test_the_head_keeps_its_type() -> None:
    given = Affine(head().weight.half(), None)
    assert (
        solved_head([rand(9, WIDTH, seed=3).half()], [rand(9, WIDTH, seed=4).half()], given, 0.1).weight.dtype
        == torch.half
    )
