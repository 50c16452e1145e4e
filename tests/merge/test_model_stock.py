"""Oracles: the paper's equation with each pair's cosine in float64; equal task vectors give the average, orthogonal and
opposite ones the base."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.merging import SHAPES, merged, method, tensors

BASE = tensors(0)
SHARED = tensors(9)
EXPERTS = [{name: SHARED[name] + 0.8 * tensors(seed)[name] for name in SHAPES} for seed in (1, 2, 3)]


def naive(base: Tensor, experts: list[Tensor]) -> Tensor:
    vectors = [(expert - base).double() for expert in experts]
    pairs = [float(a @ b / (a.norm() * b.norm())) for a, b in combinations(vectors, 2)]
    cosine, n = sum(pairs) / len(pairs), len(vectors)
    t = min(1.0, max(0.0, n * cosine / (1 + (n - 1) * cosine)))
    return t * torch.stack(experts).double().mean(0) + (1 - t) * base.double()


@pytest.mark.parametrize("filter_wise", [False, True])
def test_it_is_the_papers_formula(filter_wise: bool, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("model_stock", filter_wise=filter_wise), BASE, EXPERTS)
    for name, shape in SHAPES.items():
        by_rows = filter_wise and len(shape) == 2
        rows = [model[name].reshape(-1, shape[-1] if by_rows else BASE[name].numel()) for model in (BASE, *EXPERTS)]
        wanted = torch.stack([naive(base, experts) for base, *experts in zip(*rows, strict=True)]).view(shape)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("second", "wanted"), [([0.0, 3.0], [0.0, 0.0]), ([-2.0, 0.1], [0.0, 0.0]), ([4.0, 0.0], None)]
)
def test_orthogonal_and_opposite_experts_give_the_base_and_parallel_ones_the_average(
    second: list[float], wanted: list[float] | None, tmp_path: Path
) -> None:
    experts = [{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor(second)}]
    found = merged(tmp_path / "x", method("model_stock"), {"w": torch.zeros(2)}, experts)
    torch.testing.assert_close(found["w"], torch.tensor(wanted or [3.0, 0.0]))


def test_short_task_vectors_merge_like_long_ones(tmp_path: Path) -> None:
    wide = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    moved = [{name: 1e-4 * tensor for name, tensor in expert.items()} for expert in EXPERTS]
    found = merged(tmp_path / "x", method("model_stock"), wide, moved)
    wanted = merged(tmp_path / "y", method("model_stock"), wide, EXPERTS)
    torch.testing.assert_close(found, {name: 1e-4 * tensor for name, tensor in wanted.items()}, rtol=1e-4, atol=1e-9)
