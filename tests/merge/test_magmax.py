"""Oracle: the largest of a few numbers, by hand."""

from __future__ import annotations

from pathlib import Path

import torch

from epmq_cli.merge.magmax import largest_change
from tests.helpers.merging import merged, method, tensors


def test_each_element_takes_the_largest_change_and_the_positive_one_of_two_equal_ones() -> None:
    vectors = torch.tensor([[3.0, -1.0, 0.0, 2.0], [1.0, -4.0, 0.0, -2.0], [-5.0, 1.0, 0.0, 0.5]])
    for order in ([0, 1, 2], [2, 1, 0]):
        assert largest_change(list(vectors[order])).tolist() == [-5.0, -4.0, 0.0, 2.0]


def test_one_expert_with_a_scale_of_1_is_that_expert(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("magmax", scale=1), tensors(0), [tensors(1)])
    torch.testing.assert_close(found, tensors(1))
