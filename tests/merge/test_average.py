"""Oracle: weighted sums and means in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epmq_cli.errors import ConfigError
from tests.helpers.merging import SHAPES, merged, method, tensors

EXPERTS = {f"t{seed}": tensors(seed) for seed in (1, 2, 3)}


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_the_weighted_sum_or_mean(normalize: bool, tmp_path: Path) -> None:
    weights = {"t1": 0.5, "t2": -0.2}
    found = merged(tmp_path / "x", method("linear", weights=weights, normalize=normalize), tensors(0), EXPERTS)
    for name in SHAPES:
        total = sum(weights.get(task, 1.0) * expert[name].double() for task, expert in EXPERTS.items())
        wanted = total / (0.5 - 0.2 + 1 if normalize else 1)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_without_weights_linear_is_the_average_or_the_sum(tmp_path: Path) -> None:
    average = merged(tmp_path / "a", method("average"), tensors(0), EXPERTS)
    found = merged(tmp_path / "x", method("linear"), tensors(0), EXPERTS)
    assert all(torch.equal(found[name], average[name]) for name in SHAPES)
    total = merged(tmp_path / "y", method("linear", normalize=False), tensors(0), EXPERTS)
    torch.testing.assert_close(total, {name: 3 * tensor for name, tensor in average.items()})


def test_weights_that_sum_to_0_at_a_tensor_are_refused(tmp_path: Path) -> None:
    message = "merge.weights sum to 0 at b.weight, and the merge is divided by their sum; change the weights"
    one = [{"filter": "b.w", "value": -2}, {"value": 1}]
    with pytest.raises(ConfigError, match=message):
        merged(tmp_path / "x", method("linear", weights={"t1": one}), tensors(0), EXPERTS)
    zero = [{"filter": "b.w", "value": 0}, {"value": 1}]
    for name in ("average", "multislerp", "geometric_median"):
        with pytest.raises(ConfigError, match=message):
            merged(tmp_path / name, method(name, weights=zero), tensors(0), EXPERTS)
    merged(tmp_path / "y", method("linear", weights={"t1": one}, normalize=False), tensors(0), EXPERTS)
