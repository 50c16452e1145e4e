"""Oracles: all singular values are equal to the mean of those of the sum; the paper's Iso-CTS in float64; Iso-CTS with
only the common subspace is Iso-C; experts of low rank stay in their span."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.iso import IsoCts, iso_c, iso_cts
from epmq_cli.merge.matrices import TaskVectors
from tests.helpers.merging import merged, method, source, tensors


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(vectors: list[Tensor]) -> TaskVectors:
    return TaskVectors(torch.zeros_like(vectors[0]), {f"t{i}": vector for i, vector in enumerate(vectors)})


def whitened(M: Tensor) -> Tensor:
    """(M M')^-1/2 M, of full row rank."""
    values, vectors = torch.linalg.eigh(M @ M.T)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T @ M


def reference(vectors: list[Tensor], common: int, own: int) -> Tensor:
    """The paper's algorithm for task vectors of full rank, with this many common and own directions."""
    total = torch.stack(vectors).sum(0)
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    lefts, values, rights = [U[:, :common]], [S[:common]], [Vh[:common]]
    outside = torch.eye(len(total), dtype=torch.float64) - U[:, :common] @ U[:, :common].T
    for vector in vectors:
        left, value, right = torch.linalg.svd(outside @ vector, full_matrices=False)
        lefts, values, rights = [*lefts, left[:, :own]], [*values, value[:own]], [*rights, right[:own]]
    return torch.cat(values).mean() * whitened(torch.cat(lefts, 1).T).T @ whitened(torch.cat(rights))


def test_iso_c_has_equal_singular_values_and_the_nuclear_norm_of_the_sum() -> None:
    vectors = [random(8, 6, seed=seed) for seed in range(3)]
    found, total = iso_c(given(vectors)), torch.stack(vectors).sum(0)
    torch.testing.assert_close(torch.linalg.svdvals(found), torch.linalg.svdvals(total).mean().expand(6))
    assert torch.linalg.svdvals(found + total).sum() == pytest.approx(2 * torch.linalg.svdvals(total).sum().item())


@pytest.mark.parametrize(("shape", "fraction", "common", "own"), [((8, 6), 0.5, 3, 1), ((9, 12), 0.3, 3, 2)])
def test_iso_cts_is_the_papers_algorithm(shape: tuple[int, int], fraction: float, common: int, own: int) -> None:
    vectors = [random(*shape, seed=seed) for seed in range(3)]
    torch.testing.assert_close(iso_cts(given(vectors), fraction), reference(vectors, common, own))


def test_iso_cts_without_own_directions_is_iso_c() -> None:
    vectors = [random(8, 6, seed=seed) for seed in range(3)]
    torch.testing.assert_close(iso_cts(given(vectors), 1.0), iso_c(given(vectors)))


def test_more_own_directions_than_dimensions_are_not_taken() -> None:
    """2 rows for 3 tasks round to 1 direction each, which are 3."""
    found = iso_cts(given([random(2, 9, seed=seed) for seed in range(3)]), 0.0)
    assert found.isfinite().all()
    assert torch.linalg.matrix_rank(found) == 2


@pytest.mark.parametrize("merge", [iso_c, lambda vectors: iso_cts(vectors, 0.5)], ids=["iso_c", "iso_cts"])
def test_experts_of_low_rank_stay_in_their_span(merge: object) -> None:
    left, right = random(8, 2), random(2, 6, seed=1)
    found = merge(given([left @ torch.diag(random(2, seed=seed)) @ right for seed in (2, 3)]))  # type: ignore[operator]
    assert torch.linalg.matrix_rank(found) == 2
    torch.testing.assert_close(found @ torch.linalg.pinv(right) @ right, found)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_other_tensors_and_tables_over_the_vocabulary_are_averaged(name: str, tmp_path: Path) -> None:
    shapes = {"w": (8, 6), "bias": (8,), "conv": (4, 3, 2, 2), "zero": (5, 4), "scalar": ()}
    base, experts = tensors(0, shapes), [tensors(seed, shapes) for seed in (1, 2)]
    for expert in experts:
        expert["zero"] = base["zero"]
    found = merged(tmp_path / "x", method(name, scale=2), base, experts)
    for part in ("bias", "conv", "zero", "scalar"):
        torch.testing.assert_close(found[part], experts[0][part] + experts[1][part] - base[part])
    for tables in ("mean", "merge"):
        opened = source(tmp_path / tables, base, experts, '{"vocab_size": 8}')
        table = LazyMerge(opened, method(name, tables=tables), torch.float32).tensor("w")
        assert torch.allclose(table, (experts[0]["w"] + experts[1]["w"]) / 2, atol=1e-5) == (tables == "mean")


def test_a_bad_fraction_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"merge.common_space_fraction must be a number in \[0, 1\], got 2"):
        IsoCts(1, "mean", 2)
