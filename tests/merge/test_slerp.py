"""Oracles: the formula on whole tensors and on rows in float64; points on the unit circle; the ends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.merge.slerp import Slerp
from tests.helpers.merging import SHAPES, merged, method, tensors

BASE = tensors(0)
EXPERTS = {f"t{seed}": tensors(seed) for seed in (1, 2)}


def naive(first: Tensor, second: Tensor, t: float) -> Tensor:
    """SLERP of two vectors."""
    one, other = first.double(), second.double()
    cosine = float((one @ other) / (one.norm() * other.norm()))
    if abs(cosine) > 1 - 1e-12:
        return (1 - t) * one + t * other
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_of_two_experts_and_of_base_and_expert(t: float, tmp_path: Path) -> None:
    both = merged(tmp_path / "x", method("slerp", t=t), BASE, EXPERTS)
    single = merged(tmp_path / "y", method("slerp", t=t), BASE, {"t2": tensors(2)})
    for name, shape in SHAPES.items():
        second = tensors(2)[name].flatten()
        for found, first in ((both, tensors(1)), (single, BASE)):
            wanted = naive(first[name].flatten(), second, t).view(shape)
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_on_the_unit_circle_the_middle_has_half_the_angle(tmp_path: Path) -> None:
    experts = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}]
    found = merged(tmp_path / "x", method("slerp"), {"w": torch.zeros(2)}, experts)
    torch.testing.assert_close(found["w"], torch.full((2,), 0.5**0.5))
    opposite = [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([-2.0, -1.0])}]
    found = merged(tmp_path / "y", method("slerp", t=0.25), {"w": torch.zeros(2)}, opposite)
    torch.testing.assert_close(found["w"], torch.tensor([1.0, 0.5]))  # on the line


def test_t_may_differ_between_tensors(tmp_path: Path) -> None:
    rules = [{"filter": "a.", "value": 0}, {"value": 1}]
    found = merged(tmp_path / "x", method("slerp", t=rules), BASE, EXPERTS)
    for name in SHAPES:
        torch.testing.assert_close(found[name], tensors(1 if name.startswith("a.") else 2)[name])
    with pytest.raises(ConfigError, match=r"merge.t must be a number in \[0, 1\], got 2"):
        Slerp(t=2)


@pytest.mark.parametrize("vectors", [False, True])
def test_nuslerp_is_slerp_at_the_second_weights_share(vectors: bool, tmp_path: Path) -> None:
    options = {"weights": {"t1": 1, "t2": 3}, "task_vectors": vectors}
    found = merged(tmp_path / "x", method("nuslerp", **options), BASE, EXPERTS)
    for name, shape in SHAPES.items():
        base = BASE[name] * vectors
        first, second = ((EXPERTS[task][name] - base).flatten() for task in EXPERTS)
        wanted = base.double() + naive(first, second, 0.75).view(shape)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row_wise", [False, True])
def test_nuslerp_by_rows_and_columns(row_wise: bool, tmp_path: Path) -> None:
    options = {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
    found = merged(tmp_path / "x", method("nuslerp", **options), BASE, EXPERTS)["a.weight"]
    first, second = (EXPERTS[task]["a.weight"] for task in EXPERTS)
    if row_wise:
        found, first, second = found.T, first.T, second.T
    wanted = torch.stack([naive(one, other, 0.5) for one, other in zip(first, second, strict=True)])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_weights_of_zero_give_the_middle_and_dimensions_of_size_1_the_line(tmp_path: Path) -> None:
    rules = [{"filter": "w", "value": 0}, {"value": 1}]
    experts = [{"w": torch.tensor([[2.0], [4.0]])}, {"w": torch.tensor([[6.0], [-4.0]])}]
    options = {"weights": rules, "nuslerp_flatten": False}
    found = merged(tmp_path / "x", method("nuslerp", **options), {"w": torch.zeros(2, 1)}, experts)
    assert found["w"].tolist() == [[4.0], [0.0]]
