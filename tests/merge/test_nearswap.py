"""Oracle: the source's weights in float64."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.merging import SHAPES, merged, method, tensors


def test_it_is_the_sources_formula(tmp_path: Path) -> None:
    one, two = tensors(1), tensors(2)
    both = merged(tmp_path / "x", method("nearswap", t=0.7), tensors(0), [one, two])
    single = merged(tmp_path / "y", method("nearswap", t=0.7), one, [two])
    for name in SHAPES:
        difference = two[name].double() - one[name].double()
        weight = (0.7 / difference.abs()).clamp(0, 1)
        wanted = (1 - weight) * one[name].double() + weight * two[name].double()
        torch.testing.assert_close(both[name].double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(both[name], single[name])


def test_at_t_0_it_is_the_first_expert(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("nearswap", t=0), tensors(0), [tensors(1), tensors(2)])
    assert all(torch.equal(found[name], tensors(1)[name]) for name in SHAPES)
