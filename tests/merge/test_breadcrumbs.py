"""Oracle: a sort of each tensor or row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.merge.breadcrumbs import without_extremes
from tests.helpers.merging import SHAPES, merged, method, tensors

EXPERTS = {f"t{seed}": tensors(seed) for seed in (1, 2, 3)}


def naive(vector: Tensor, density: float, gamma: float) -> Tensor:
    """One row without its extremes."""
    n = len(vector)
    kept = max(1, int(density * n))
    top = min(int(gamma * n), n - kept)
    chosen = vector.abs().argsort(descending=True)[top : top + kept]
    return torch.zeros_like(vector).index_copy(0, chosen, vector[chosen])


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.2), (0.9, 0.5), (1, 0.3), (0.3, 0), (0.01, 0)])
def test_the_extremes_are_removed(density: float, gamma: float) -> None:
    rows = torch.randn(4, 31, generator=torch.Generator().manual_seed(0))
    found = without_extremes(rows, density, gamma)
    assert torch.equal(found, torch.stack([naive(row, density, gamma) for row in rows]))
    assert (found != 0).sum(1).tolist() == [max(1, int(density * 31))] * 4


def test_without_gamma_the_largest_elements_are_kept() -> None:
    for n in (1, 3, 99):
        row = torch.arange(1.0, n + 1)[None]
        assert without_extremes(row, 0.9, 0.0)[0, -1] == n
        assert without_extremes(row, 0.9, 0.009)[0, -1] == n


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_it_is_task_arithmetic_of_the_rest(scope: str, tmp_path: Path) -> None:
    weights = {"t2": -0.5}
    options = {"density": {"t1": 0.3, "t2": 0.6, "t3": 1}, "gamma": 0.2, "weights": weights, "scope": scope}
    found = merged(tmp_path / "x", method("breadcrumbs", **options), tensors(0), EXPERTS)
    for name, shape in SHAPES.items():
        wanted, width = tensors(0)[name].double(), shape[-1] if scope == "row" and shape else -1
        for task, expert in EXPERTS.items():
            rows = (expert[name] - tensors(0)[name]).reshape(-1 if width > 0 else 1, width).double()
            rest = torch.stack([naive(row, options["density"][task], 0.2) for row in rows]).view(shape)  # type: ignore[index]
            wanted = wanted + 0.3 * weights.get(task, 1.0) * rest
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)
