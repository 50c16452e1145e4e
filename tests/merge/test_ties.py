"""Oracles: a naive TIES with weights in float64, trimmed by a sort of the whole vector or of each tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from tests.helpers.merging import SHAPES, merged, method, tensors

EXPERTS = {f"t{seed}": tensors(seed) for seed in (1, 2, 3)}
DENSITY = {"t1": 0.2, "t2": 0.5, "t3": 1}
WEIGHTS = {"t1": 2.0, "t2": -0.5}


def trimmed(vector: Tensor, density: float) -> Tensor:
    """A flat task vector without its smaller elements."""
    kept = vector.abs().argsort(descending=True)[: max(1, int(density * len(vector)))]
    return torch.zeros_like(vector).index_copy(0, kept, vector[kept])


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_ties_with_weights_and_a_density_for_each_expert(scope: str, combine: str, tmp_path: Path) -> None:
    options = {"density": DENSITY, "weights": WEIGHTS, "scale": 0.5, "scope": scope, "combine": combine}
    found = merged(tmp_path / "x", method("ties", **options), tensors(0), EXPERTS)
    sizes = [tensors(0)[name].numel() for name in SHAPES]
    vectors = []
    for task, expert in EXPERTS.items():
        parts = [(expert[name].double() - tensors(0)[name].double()).flatten() for name in SHAPES]
        whole = [torch.cat(parts)] if scope == "global" else parts
        vectors.append(WEIGHTS.get(task, 1.0) * torch.cat([trimmed(part, DENSITY[task]) for part in whole]))
    every = torch.stack(vectors)
    agrees = every * every.sum(0).sign() > 0
    total = (agrees * every).sum(0)
    if combine == "mean":
        own = torch.tensor([WEIGHTS.get(task, 1.0) for task in EXPERTS]).abs()[:, None]
        total = total / (own * agrees).sum(0).clamp(min=1e-9)
    for name, part in zip(SHAPES, total.split(sizes), strict=True):
        wanted = tensors(0)[name].double() + 0.5 * part.view(SHAPES[name])
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_density_that_differs_between_tensors_needs_the_scope_tensor(tmp_path: Path) -> None:
    rules = [{"filter": "a.", "value": 1}, {"value": 0.1}]
    with pytest.raises(ConfigError, match="merge.density differs between tensors, and merge.scope=global trims all"):
        method("ties", density=rules).check([*EXPERTS])
    made = method("ties", density=rules, scope="tensor", scale=1)
    made.check([*EXPERTS])
    found = merged(tmp_path / "x", made, tensors(0), {"t1": tensors(1)})
    torch.testing.assert_close(found["a.weight"], tensors(1)["a.weight"])
    assert int((found["b.weight"] != tensors(0)["b.weight"]).sum()) == 2
