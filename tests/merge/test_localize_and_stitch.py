"""Oracle: the largest elements of the whole vectors by a sort, averaged where they overlap."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.merging import merged, method, tensors


def test_it_averages_the_largest_elements_of_the_whole_vectors(tmp_path: Path) -> None:
    base, experts = tensors(0), [tensors(1), tensors(2)]
    experts[1]["a.bias"] *= 100  # all its elements are among the largest of the whole vector
    flat = [torch.cat([(expert[name] - base[name]).flatten() for name in base]) for expert in experts]
    kept = int(0.3 * len(flat[0]))
    masks = torch.stack([vector.abs() >= vector.abs().sort(descending=True).values[kept - 1] for vector in flat])
    wanted = (torch.stack(flat) * masks).sum(0) / masks.sum(0).clamp(min=1)
    found = merged(tmp_path / "x", method("localize_and_stitch", density=0.3), base, experts)
    torch.testing.assert_close(torch.cat([(found[name] - base[name]).flatten() for name in base]), wanted)


def test_elements_that_an_expert_did_not_train_are_not_averaged(tmp_path: Path) -> None:
    """With few changes the threshold is zero, which all elements reach."""
    base = {"w": torch.zeros(4)}
    experts = [{"w": torch.tensor([2.0, 0.0, 0.0, 0.0])}, {"w": torch.tensor([4.0, 6.0, 0.0, 0.0])}]
    found = merged(tmp_path / "x", method("localize_and_stitch", density=1.0), base, experts)
    assert found["w"].tolist() == [3.0, 6.0, 0.0, 0.0]
