"""Oracle: the source's steps in float64, with its tangents, which sum to zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.merging import SHAPES, merged, method, tensors

BASE = tensors(0)
EXPERTS = {f"t{seed}": tensors(seed) for seed in (1, 2, 3)}


def naive(models: list[Tensor], weights: list[float]) -> Tensor:
    """Multi-SLERP of vectors."""
    units = [model / model.norm() for model in models]
    mean = sum((weight * unit for weight, unit in zip(weights, units, strict=True)), torch.zeros_like(units[0]))
    mean = mean / mean.norm()
    step = torch.zeros_like(mean)
    for weight, unit in zip(weights, units, strict=True):
        step += weight * (unit - (unit @ mean) * mean)
    size = step.norm() + 1e-12
    length = sum(weight * float(model.norm()) for weight, model in zip(weights, models, strict=True))
    return length * (size.cos() * mean + size.sin() / size * step)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_it_is_the_sources_formula(vectors: bool, normalize: bool, tmp_path: Path) -> None:
    weights = {"t1": 0.5, "t2": 2.0}
    options = {"weights": weights, "task_vectors": vectors, "normalize_weights": normalize}
    found = merged(tmp_path / "x", method("multislerp", **options), BASE, EXPERTS)
    own = [weights.get(task, 1.0) / (3.5 if normalize else 1) for task in EXPERTS]
    for name, shape in SHAPES.items():
        base = BASE[name].double() * vectors
        models = [(expert[name].double() - base).flatten() for expert in EXPERTS.values()]
        torch.testing.assert_close(found[name].double(), base + naive(models, own).view(shape), rtol=1e-4, atol=1e-5)


def test_experts_that_cancel_give_the_weighted_average(tmp_path: Path) -> None:
    models = [{"w": torch.tensor([number, 0.0])} for number in (2.0, -4.0)]
    found = merged(tmp_path / "x", method("multislerp"), {"w": torch.zeros(2)}, models)
    assert found["w"].tolist() == [-1.0, 0.0]
