"""Oracles: the iteration on whole tensors in float64; two experts give the middle of SLERP; the condition of a mean on
the sphere."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.helpers.merging import SHAPES, merged, method, tensors

BASE = tensors(0)
EXPERTS = [tensors(seed) for seed in (1, 2, 3)]


def naive(models: list[Tensor], steps: int) -> Tensor:
    """The Karcher mean of vectors."""
    norms = [model.norm() for model in models]
    units = [model / norm for model, norm in zip(models, norms, strict=True)]
    mean = sum(units, torch.zeros_like(units[0]))
    mean = mean / mean.norm()
    for _ in range(steps):
        step = torch.zeros_like(mean)
        for unit in units:
            cosine = (mean @ unit).clamp(-1, 1)
            if len(mean) > 1:
                step += cosine.acos() / cosine.acos().sin() * (unit - cosine * mean) / len(units)
        if step.norm() > 1e-5:
            mean = step.norm().cos() * mean + step.norm().sin() * step / step.norm()
    return sum(norms) / len(norms) * mean


def test_it_is_the_iteration_on_whole_tensors(tmp_path: Path) -> None:
    for steps in (1, 10):
        found = merged(tmp_path / str(steps), method("karcher", max_iter=steps), BASE, EXPERTS)
        for name, shape in SHAPES.items():
            wanted = naive([expert[name].flatten().double() for expert in EXPERTS], steps).view(shape)
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_tangents_at_the_mean_cancel(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("karcher", max_iter=1000, tol=1e-9), BASE, EXPERTS)["a.weight"].double()
    mean, total = found.flatten() / found.norm(), torch.zeros(24).double()
    for expert in EXPERTS:
        unit = expert["a.weight"].double().flatten() / expert["a.weight"].double().norm()
        angle = (mean @ unit).acos()
        total += angle / angle.sin() * (unit - angle.cos() * mean)
    assert total.norm() < 1e-6


def test_two_experts_of_one_length_give_the_middle_of_slerp(tmp_path: Path) -> None:
    experts = [{"w": expert["a.weight"] / expert["a.weight"].norm()} for expert in EXPERTS[:2]]
    base = {"w": torch.zeros(4, 6)}
    found = merged(tmp_path / "x", method("karcher"), base, experts)
    torch.testing.assert_close(found, merged(tmp_path / "y", method("slerp"), base, experts))


def test_opposite_and_zero_experts(tmp_path: Path) -> None:
    one, zero = torch.tensor([3.0, 1.0]), torch.zeros(2)
    for number, (models, wanted) in enumerate(
        [([one, -one], zero), ([one, one, -one], one), ([one, zero], one / 2), ([zero, zero], zero)]
    ):
        found = merged(tmp_path / str(number), method("karcher"), {"w": zero}, [{"w": model} for model in models])
        torch.testing.assert_close(found["w"], wanted)
