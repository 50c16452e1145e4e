"""Oracle: importance, quartiles and mask on whole tensors in float64."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.merging import merged, method, tensors

SHAPES = {"matrix": (40, 6), "vector": (30,), "conv": (4, 3, 2, 2), "large": (700, 200)}


def test_it_takes_the_most_important_elements(tmp_path: Path) -> None:
    base, expert = tensors(0, SHAPES), tensors(1, SHAPES)
    found = merged(tmp_path / "x", method("arcee_fusion"), base, [expert])
    both = merged(tmp_path / "y", method("arcee_fusion"), tensors(2, SHAPES), [base, expert])
    for name in SHAPES:
        before, after = base[name].double(), expert[name].double()
        P, Q = after.softmax(-1) + 1e-8, before.softmax(-1) + 1e-8
        importance = (after - before).abs() * (P * (P / Q).log()).sum(-1, keepdim=True)
        order = importance.flatten().sort().values
        q1, median, q3 = (order[int(share * (len(order) - 1))] for share in (0.25, 0.5, 0.75))
        mask = importance >= median + 1.5 * (q3 - q1)
        assert 0 < int(mask.sum()) < mask.numel() / 4
        assert torch.equal(found[name], torch.where(mask, expert[name], base[name]))
        assert torch.equal(both[name], found[name])


def test_a_single_element_is_taken(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("arcee_fusion"), {"w": torch.tensor(1.0)}, [{"w": torch.tensor(2.0)}])
    assert found["w"] == 2
