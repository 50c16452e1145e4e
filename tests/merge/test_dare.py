"""Oracles: at density 1, Task Arithmetic and untrimmed TIES, bit for bit; the paper's formula with the same random
numbers; the mean over seeds is the task vector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.merge.dare import DareTies, dropped
from epmq_cli.merge.method import Piece
from tests.helpers.merging import SHAPES, merged, method, tensors

EXPERTS = [tensors(seed) for seed in (1, 2, 3)]


def kept_elements(seed: int, task: str, name: str, density: float) -> Tensor:
    """(elements,), for a tensor of one piece: which elements of its task vector are kept."""
    elements = tensors(0)[name].numel()
    generator = Piece(name, 0, torch.zeros(elements), {}).generator(seed, task)
    return torch.from_numpy(generator.random(elements, dtype=np.float32)).view(SHAPES[name]) < density


def test_at_density_1_it_is_task_arithmetic_bit_for_bit(tmp_path: Path) -> None:
    for number, weights in enumerate((None, {"t1": 0.5, "t2": 0})):
        found = merged(tmp_path / f"d{number}", method("dare_linear", density=1, weights=weights), tensors(0), EXPERTS)
        wanted = merged(tmp_path / f"t{number}", method("task_arithmetic", weights=weights), tensors(0), EXPERTS)
        assert all(torch.equal(found[name], wanted[name]) for name in SHAPES)


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_at_density_1_dare_ties_is_untrimmed_ties(combine: str, tmp_path: Path) -> None:
    options = {"density": 1, "scale": 0.7, "combine": combine}
    found = merged(tmp_path / "d", method("dare_ties", **options), tensors(0), EXPERTS)
    wanted = merged(tmp_path / "t", method("ties", **options), tensors(0), EXPERTS)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_dare_linear_is_the_papers_formula(name: str, tmp_path: Path) -> None:
    base, weights = tensors(0)[name].double(), {"t0": 2.0}
    found = merged(
        tmp_path / "x", method("dare_linear", density=0.4, scale=0.3, weights=weights, seed=5), tensors(0), EXPERTS
    )
    wanted = base.clone()
    for task, expert in enumerate(EXPERTS):
        vector = torch.where(kept_elements(5, f"t{task}", name, 0.4), expert[name].double() - base, 0) / (1 - 0.6)
        wanted += 0.3 * weights.get(f"t{task}", 1.0) * vector
    torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_dare_ties_elects_signs_and_merges_agreeing_elements(combine: str, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("dare_ties", density=0.6, combine=combine), tensors(0), EXPERTS)
    for name in SHAPES:
        base = tensors(0)[name].double()
        vectors = torch.stack(
            [
                torch.where(kept_elements(0, f"t{task}", name, 0.6), expert[name].double() - base, 0) / 0.6
                for task, expert in enumerate(EXPERTS)
            ]
        )
        agreeing = torch.where(vectors * vectors.sum(0).sign() > 0, vectors, 0)
        value = agreeing.sum(0) / (agreeing.ne(0).sum(0).clamp(min=1) if combine == "mean" else 1)
        torch.testing.assert_close(found[name].double(), base + 0.5 * value, rtol=1e-5, atol=1e-6)


def test_the_mean_over_seeds_is_the_task_vector_and_density_is_the_kept_share() -> None:
    vector, density, seeds = torch.linspace(-2, 3, 50), 0.3, 2000
    piece = Piece("w", 0, torch.zeros(50), {})
    drops = torch.stack([dropped(vector, density, piece.generator(seed, "t")) for seed in range(seeds)])
    spread = vector.abs() * ((1 - density) / density / seeds) ** 0.5  # the standard deviation of the mean
    assert bool(((drops.mean(0) - vector).abs() <= 4.5 * spread).all())
    share = float(drops.ne(0).float().mean())
    assert abs(share - density) < 4 * (density * (1 - density) / drops.numel()) ** 0.5
    left = drops[0] != 0
    assert torch.equal(drops[0][left], (vector / density)[left])  # not divided by the actual share_elements


def test_another_seed_drops_other_elements(tmp_path: Path) -> None:
    found = [merged(tmp_path / str(s), method("dare_linear", seed=s), tensors(0), EXPERTS) for s in (0, 1)]
    assert not torch.equal(found[0]["a.weight"], found[1]["a.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"merge.density must be a number in \(0, 1\], got 0"),
        ({"scale": 11}, r"merge.scale must be a number in \[0, 10\], got 11"),
        ({"combine": "max"}, "merge.combine must be one of sum, mean, got 'max'"),
        (
            {"weights": {"t0": "x"}},
            r"merge.weights.t0 must be a number in \[-100, 100\], or null, a list.*; got 'x'",
        ),
        ({"seed": -1}, r"seed must be a whole number in \[0, 2147483647\], got -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    good = {"density": 0.5, "scale": 0.5, "weights": None, "seed": 0, "combine": "sum"}
    with pytest.raises(ConfigError, match=message):
        DareTies(**{**good, **options})  # type: ignore[arg-type]
