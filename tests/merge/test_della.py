"""Oracles: the ranks of a sort; the mean over seeds is the task vector; the paper's formula with the same random
numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.merge.della import probabilities, pruned
from epmq_cli.merge.method import Piece
from tests.helpers.merging import SHAPES, merged, method, tensors

EXPERTS = {f"t{seed}": tensors(seed) for seed in (1, 2, 3)}


def test_probabilities_grow_with_the_rank_in_the_row() -> None:
    rows = np.array([[3.0, 0.5, 2.0, 0.0, 9.0], [1.0, 1.0, 0.0, 0.0, 2.0]], np.float32)
    found = probabilities(rows, 0.5, 0.2)
    wanted = [[0.6, 0.4, 0.5, 0.3, 0.7], [0.5, 0.6, 0.3, 0.4, 0.7]]  # of equal ones the first has the lower rank
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert probabilities(rows[:, :1], 0.5, 0.2).tolist() == [[0.5], [0.5]]


def test_the_mean_over_seeds_is_the_task_vector_and_large_elements_are_kept_more_often() -> None:
    vector, seeds = torch.linspace(0.5, 3, 40)[None], 3000
    piece = Piece("w", 0, torch.zeros(40), {})
    drops = torch.stack([pruned(vector, 0.5, 0.3, piece.generator(seed, "t"))[0] for seed in range(seeds)])
    keep = torch.linspace(0.2, 0.8, 40)
    deviation = vector[0] * ((1 - keep) / keep / seeds) ** 0.5
    assert bool(((drops.mean(0) - vector[0]).abs() <= 4.5 * deviation).all())
    shares = (drops != 0).float().mean(0)
    assert bool(((shares - keep).abs() < 4.5 * (keep * (1 - keep) / seeds) ** 0.5).all())


def kept(task: str, name: str) -> Tensor:
    """The task vector of an expert after the drop, in the formula of the paper with the method's random numbers."""
    base, vector = tensors(0)[name], EXPERTS[task][name].double() - tensors(0)[name].double()
    rows = vector.reshape(-1, base.shape[-1] if base.ndim == 2 else base.numel())
    ranks = rows.abs().argsort(1).argsort(1).double()
    last = rows.shape[1] - 1
    keep = 0.6 - 0.2 + 0.4 * (ranks / last if last else torch.full_like(ranks, 0.5))
    random = Piece(name, 0, torch.zeros(1), {}).generator(7, task).random(rows.shape, dtype=np.float32)
    return torch.where(torch.from_numpy(random).double() < keep, rows / keep, 0).view(base.shape)


@pytest.mark.parametrize("combine", [None, "sum", "mean"])
def test_it_is_the_papers_formula(combine: str | None, tmp_path: Path) -> None:
    weights = {"t1": 2.0}
    options = {"density": 0.6, "epsilon": 0.2, "scale": 0.5, "weights": weights, "seed": 7}
    made = method("della", **options, combine=combine) if combine else method("della_linear", **options)
    found = merged(tmp_path / "x", made, tensors(0), EXPERTS)
    for name in SHAPES:
        own = torch.tensor([weights.get(task, 1.0) for task in EXPERTS]).double()
        own = own.view(-1, *[1] * tensors(0)[name].ndim)
        vectors = own * torch.stack([kept(task, name) for task in EXPERTS])
        agrees = vectors * vectors.sum(0).sign() > 0 if combine else torch.ones_like(vectors).bool()
        total = (agrees * vectors).sum(0)
        if combine == "mean":
            total = total / (own * agrees).sum(0).clamp(min=1e-9)
        wanted = tensors(0)[name].double() + 0.5 * total
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_probabilities_outside_0_to_1_are_refused(tmp_path: Path) -> None:
    message = (
        r"merge.density - merge.epsilon must be above 0 and merge.density \+ merge.epsilon at most 1, got 0.9 and "
        r"0.15; choose a smaller merge.epsilon"
    )
    with pytest.raises(ConfigError, match=message):
        method("della", density=0.9).check(["t1"])
    with pytest.raises(ConfigError, match=r"got 0.1 and 0.15"):
        method("della_linear", density=0.1).check(["t1"])
    with pytest.raises(ConfigError, match=message):
        merged(tmp_path / "x", method("della", density={"t1": 0.9, "t2": 0.5, "t3": 0.5}), tensors(0), EXPERTS)
    method("della", density=1).check(["t1"])
