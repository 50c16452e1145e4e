"""Oracle: the factor of each layer by hand, in two stacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.merging import merged, method, tensors

FACTORS = {
    "encoder.embed.weight": 0.0,
    "encoder.block.0.w": 0.0,
    "encoder.block.1.w": 0.5,
    "encoder.block.2.w": 1.0,
    "decoder.block.0.w": 0.0,
    "decoder.block.1.w": 1.0,
    "final_norm.weight": 1.0,
}
"""The depth of each tensor."""
SHAPES = dict.fromkeys(FACTORS, (3, 2))
BASE, EXPERTS = tensors(0, SHAPES), [tensors(1, SHAPES), tensors(2, SHAPES)]


@pytest.mark.parametrize(("alpha", "first"), [(0.1, 0.1), (None, 0.5)])
def test_the_factor_grows_over_the_layers_of_each_stack(alpha: float | None, first: float, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("lines", alpha=alpha, beta=0.4), BASE, EXPERTS)
    for name, depth in FACTORS.items():
        total = EXPERTS[0][name] + EXPERTS[1][name] - 2 * BASE[name]
        torch.testing.assert_close(found[name], BASE[name] + (first + 0.4 * depth) * total)


@pytest.mark.parametrize("name", ["ties", "iso_c"])
def test_as_a_post_processor_it_scales_the_task_vector_of_another_merge(name: str, tmp_path: Path) -> None:
    plain = merged(tmp_path / "x", method(name), BASE, EXPERTS)
    post = [{"name": "lines", "alpha": 0.2, "beta": 0.3}]
    found = merged(tmp_path / "y", method(name, post=post), BASE, EXPERTS)
    for part, depth in FACTORS.items():
        torch.testing.assert_close(found[part], BASE[part] + (0.2 + 0.3 * depth) * (plain[part] - BASE[part]))
