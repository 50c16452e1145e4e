"""Oracles: the loss and its gradient by autograd, torch's Adam on the paper's loss, least squares for the minimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.merge.wudi import Wudi, closed_form, gradient_steps
from tests.merge.test_iso import given, random

VECTORS = [random(8, 6, seed=seed) for seed in range(3)]


def loss(merged: Tensor, vectors: list[Tensor]) -> Tensor:
    """The paper's equation 12."""
    return torch.stack([((merged - T) @ T.T).square().sum() / T.square().sum() for T in vectors]).sum()


def test_gradient_steps_are_adam_on_the_papers_loss() -> None:
    merged = torch.stack(VECTORS).sum(0).requires_grad_()
    adam = torch.optim.Adam([merged], lr=1e-2)
    for _ in range(20):
        adam.zero_grad()
        loss(merged, VECTORS).backward()
        adam.step()
    found = gradient_steps(given(VECTORS), 20, 1e-2)
    torch.testing.assert_close(found, merged.detach())
    assert loss(found, VECTORS) < loss(torch.stack(VECTORS).sum(0), VECTORS)


@pytest.mark.parametrize("ridge", [1e-9, 0.1])
def test_the_closed_form_is_where_the_gradient_of_the_loss_and_the_ridge_is_zero(ridge: float) -> None:
    found = closed_form(given(VECTORS), ridge).requires_grad_()
    weight = ridge * sum(1.0 for _ in VECTORS) / 6  # the mean of the diagonal: each G has trace 1
    total = torch.stack(VECTORS).sum(0)
    (loss(found, VECTORS) + weight * (found - total).square().sum()).backward()
    assert found.grad is not None
    torch.testing.assert_close(found.grad, torch.zeros(8, 6, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_minimum_is_regmean_with_the_task_vectors_as_inputs() -> None:
    """Least squares of merged' on vector', over the rows of each task vector as inputs."""
    inputs = torch.cat([T / T.norm() for T in VECTORS])
    outputs = torch.cat([T @ T.T / T.norm() for T in VECTORS])
    wanted = torch.linalg.lstsq(inputs, outputs).solution.T
    torch.testing.assert_close(closed_form(given(VECTORS), 1e-12), wanted)


@pytest.mark.parametrize("ridge", [1e-3, 10.0])
def test_one_expert_is_reproduced_and_zero_vectors_change_nothing(ridge: float) -> None:
    """Also experts of low rank, for which A is singular."""
    vector = random(8, 2) @ random(2, 6, seed=1)
    zero = torch.zeros(8, 6, dtype=torch.float64)
    for vectors in ([vector], [vector, zero], [zero, vector]):
        torch.testing.assert_close(closed_form(given(vectors), ridge), vector)
        torch.testing.assert_close(gradient_steps(given(vectors), 5, 1e-2), vector)
    for found in (closed_form(given([zero, zero]), ridge), gradient_steps(given([zero, zero]), 5, 1e-2)):
        assert torch.equal(found, zero)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "merge.solver must be one of gradient, closed_form, got 'newton'"),
        ({"lr": 0}, r"merge.lr must be a number in \(0, 1\], got 0"),
        ({"iterations": 0}, r"merge.iterations must be a whole number in \[1, 100000\], got 0"),
        ({"ridge": 0}, r"merge.ridge must be a number in \(0, 100\], got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Wudi(**{"solver": "gradient", "iterations": 3, "lr": 1e-5, "ridge": 0.01, "tables": "mean", **options})  # type: ignore[arg-type]
