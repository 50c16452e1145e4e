"""Oracles: one expert is reproduced; orthogonal low-rank experts add up exactly; equal experts give the truncation
of one; the paper's algorithm in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.tsv_m import TsvM, merged_singular_vectors, nearest_orthonormal
from tests.helpers.merging import merged, method, source, tensors

SHAPES = {"w": (8, 6), "conv": (4, 3, 2, 2), "bias": (8,), "few": (2, 9)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(vectors: list[Tensor], k: int) -> Tensor:
    """The paper's algorithm 1, for task vectors of full rank: truncate, stack, whiten, multiply."""
    parts = [torch.linalg.svd(vector) for vector in vectors]
    U = torch.cat([U[:, :k] for U, _, _ in parts], 1)
    S = torch.cat([S[:k] for _, S, _ in parts])
    V = torch.cat([Vh[:k] for _, _, Vh in parts], 0)

    def whitened(M: Tensor) -> Tensor:  # (M M')^-1/2 M
        values, vectors = torch.linalg.eigh(M @ M.T)
        return vectors @ torch.diag(values.rsqrt()) @ vectors.T @ M

    return whitened(U.T).T @ torch.diag(S) @ whitened(V)


def test_it_is_the_papers_algorithm() -> None:
    vectors = [random(8, 6, seed=seed) for seed in range(3)]
    torch.testing.assert_close(merged_singular_vectors(vectors, 2), reference(vectors, 2))


def test_one_expert_is_reproduced(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("tsv_m"), tensors(0, SHAPES), [tensors(1, SHAPES)])
    torch.testing.assert_close(found, tensors(1, SHAPES), rtol=1e-5, atol=1e-5)


def test_orthogonal_experts_of_low_rank_add_up_exactly() -> None:
    """Also if their rank is lower than the number of kept singular vectors, where those with value 0 are arbitrary."""
    left, right = (torch.linalg.qr(random(9, 9, seed=seed))[0] for seed in (1, 2))
    vectors = [left[:, at] @ torch.diag(random(2).abs()) @ right[:, at].T for at in ([0, 1], [2, 3], [4, 5])]
    for rank in (2, 3):
        torch.testing.assert_close(merged_singular_vectors(vectors, rank), sum(vectors, torch.zeros(9, 9)).double())


def test_equal_experts_give_the_truncation_of_one() -> None:
    vector = random(8, 6)
    U, S, Vh = torch.linalg.svd(vector, full_matrices=False)
    torch.testing.assert_close(merged_singular_vectors([vector, vector], 3), U[:, :3] * S[:3] @ Vh[:3])


def test_untrained_matrices_stay_unchanged() -> None:
    assert not merged_singular_vectors([torch.zeros(5, 4), torch.zeros(5, 4)], 2).any()


def test_the_nearest_orthonormal_columns() -> None:
    columns = random(7, 3)
    found = nearest_orthonormal(columns)
    torch.testing.assert_close(found.T @ found, torch.eye(3, dtype=torch.float64))
    turned = torch.linalg.qr(random(3, 3, seed=4))[0]
    assert (found - columns).norm() <= (found @ turned - columns).norm()


def test_other_tensors_and_matrices_too_small_for_all_experts_are_averaged(tmp_path: Path) -> None:
    base, experts = tensors(0, SHAPES), [tensors(seed, SHAPES) for seed in (1, 2, 3)]
    found = merged(tmp_path / "x", method("tsv_m", scale=2), base, experts)
    for name in ("conv", "bias", "few"):
        mean = torch.stack([expert[name] for expert in experts]).mean(0)
        torch.testing.assert_close(found[name], base[name] + 2 * (mean - base[name]))
    vectors = [(expert["w"] - base["w"]).double() for expert in experts]
    torch.testing.assert_close(found["w"], base["w"] + 2 * reference(vectors, 2).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tables", ["mean", "merge", "svd"])
def test_tables_over_the_vocabulary_are_decomposed_only_on_request(tables: str, tmp_path: Path) -> None:
    base, experts = tensors(0, SHAPES), [tensors(seed, SHAPES) for seed in (1, 2)]
    opened = source(tmp_path, base, experts, '{"vocab_size": 8}')
    found = LazyMerge(opened, method("tsv_m", tables=tables), torch.float32).tensor("w")
    mean = (experts[0]["w"] + experts[1]["w"]) / 2
    assert torch.allclose(found, mean, atol=1e-5) == (tables == "mean")


def test_fraction_is_the_kept_share_of_each_expert(tmp_path: Path) -> None:
    base, experts = tensors(0, SHAPES), [tensors(seed, SHAPES) for seed in (1, 2)]
    found = merged(tmp_path / "x", method("tsv_m", fraction=0.2), base, experts)["w"]
    vectors = [(expert["w"] - base["w"]).double() for expert in experts]
    torch.testing.assert_close(found, base["w"] + reference(vectors, 1).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1}, r"merge.scale must be a number in \[0, 10\], got -1"),
        ({"fraction": 0}, r"merge.fraction must be a number in \(0, 1\], got 0"),
        ({"tables": "drop"}, "merge.tables must be one of mean, merge, got 'drop'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TsvM(**{"scale": 1, "fraction": None, "tables": "mean", **options})  # type: ignore[arg-type]


def test_more_singular_vectors_than_fit_are_refused() -> None:
    TsvM(1, 1 / 3, "mean").check(["a", "b", "c"])
    with pytest.raises(
        ConfigError, match=r"merge.fraction must be at most 1 / 3 for 3 experts, .*, got 0.5; null means"
    ):
        TsvM(1, 0.5, "mean").check(["a", "b", "c"])
