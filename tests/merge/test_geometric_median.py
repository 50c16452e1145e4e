"""Oracles: the unit vectors from a geometric median to the experts cancel; two of three equal experts; the median of
numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.merging import SHAPES, merged, method, tensors

BASE = tensors(0)


def test_the_directions_to_the_experts_cancel(tmp_path: Path) -> None:
    experts = {f"t{seed}": tensors(seed) for seed in (1, 2, 3, 4)}
    weights = {"t1": 1.5}
    found = merged(
        tmp_path / "x", method("geometric_median", max_iter=10_000, tol=1e-12, weights=weights), BASE, experts
    )
    for name in ("a.weight", "b.weight"):
        ways = [expert[name].double() - found[name].double() for expert in experts.values()]
        total = sum((weights.get(task, 1.0) * way / way.norm() for task, way in zip(experts, ways, strict=True)))
        assert torch.as_tensor(total).norm() < 1e-5


def test_an_outlier_does_not_count_and_two_of_three_win(tmp_path: Path) -> None:
    experts = [tensors(1), tensors(1), {name: 1000 * tensor for name, tensor in tensors(2).items()}]
    found = merged(tmp_path / "x", method("geometric_median"), BASE, experts)
    for name in SHAPES:
        assert float((found[name] - tensors(1)[name]).abs().max()) < 0.01


def test_of_numbers_it_is_the_median(tmp_path: Path) -> None:
    experts = [{"w": torch.tensor(number)} for number in (1.0, 2.0, 50.0)]
    found = merged(tmp_path / "x", method("geometric_median", max_iter=1000), {"w": torch.tensor(0.0)}, experts)
    torch.testing.assert_close(found["w"], torch.tensor(2.0), rtol=1e-3, atol=0)
