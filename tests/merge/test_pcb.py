"""Oracles: the authors' formulas on the whole matrix of task vectors; order statistics by a sort."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.merge.pcb import order_statistics
from tests.helpers.merging import merged, method, source, tensors

SHAPES = {"a": (300, 70), "b": (31,), "c": ()}


def scaled(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (x.clamp(low[:, None], high[:, None]) - low[:, None]) / (high - low)[:, None]


def reference(T: Tensor, ratio: float) -> Tensor:
    """The merged task vector (d,) of task vectors (n, d)."""
    n, d = T.shape
    order = T.abs().sort(1).values
    ends = order[:, int(d * 0.0001)], order[:, int(d * (1 - 0.0001) - 1)]
    weights = torch.exp(n * scaled(T.abs(), *ends) ** 2) * torch.tanh(T * T.sum(0))
    order = weights.sort(1).values
    scale = scaled(weights, order[:, int(d * (1 - ratio))], order[:, -1])
    clipped = T.sign() * T.abs().clamp(ends[0][:, None], ends[1][:, None])
    return (clipped * scale).sum(0) / scale.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize(("ratio", "size"), [(0.1, 1.0), (0.05, 0.01), (0.9, 1.0)])
def test_it_is_the_authors_formula(ratio: float, size: float, tmp_path: Path) -> None:
    """A ratio of 0.9 has a negative threshold."""
    base = tensors(0, SHAPES)
    vectors = [{name: size * tensor for name, tensor in tensors(seed, SHAPES).items()} for seed in (1, 2, 3)]
    experts = [{name: base[name] + vector[name] for name in SHAPES} for vector in vectors]
    flat = torch.stack([torch.cat([(e[name] - base[name]).flatten() for name in SHAPES]) for e in experts])
    found = merged(tmp_path / "x", method("pcb", pcb_ratio=ratio), base, experts)
    change = torch.cat([(found[name] - base[name]).flatten() for name in SHAPES])
    torch.testing.assert_close(change.double(), reference(flat.double(), ratio), rtol=1e-3, atol=2e-6)


def test_order_statistics_are_those_of_a_sort(tmp_path: Path) -> None:
    experts = [tensors(seed, SHAPES) for seed in (1, 2)]
    opened = source(tmp_path, tensors(0, SHAPES), experts)
    length = 300 * 70 + 32
    places = [lambda _, at=at: at for at in (0, 1, length // 2 - 50, length // 2 + 50, length - 1)]
    found = order_statistics(opened, lambda piece: list(piece.experts.values()), places)
    for row, expert in zip(found, experts, strict=True):
        order = torch.cat([expert[name].flatten() for name in SHAPES]).sort().values
        assert row == [order[place(0)].item() for place in places]


@pytest.mark.parametrize("shape", [(), (1,), (1, 3)])
def test_few_and_equal_elements_stay_finite(shape: tuple[int, ...], tmp_path: Path) -> None:
    base, expert = {"w": torch.zeros(shape)}, {"w": torch.ones(shape)}
    found = merged(tmp_path / "x", method("pcb"), base, [expert, expert])
    assert found["w"].isfinite().all()
