"""Oracles: the product of the factors, and the eigenvalues of small matrices."""

import pytest
import torch

from epmq_cli.quantize import linalg
from epmq_cli.quantize.linalg import (
    SMALL,
    cholesky_solve,
    condition,
    damped_cholesky,
    invert_triangular,
    triangular_inverse,
)


def moment(columns: int = 8) -> torch.Tensor:
    rows = torch.randn(40, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows.T @ rows


def test_factor_multiplies_out_to_the_damped_matrix() -> None:
    H = moment()
    factor = damped_cholesky(H, 0.1)
    assert factor is not None
    assert factor.damping == 0.1
    assert factor.retries == 0
    damped = H + 0.1 * H.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(factor.lower @ factor.lower.T, damped)


def test_singular_matrix_is_damped_just_enough() -> None:
    factor = damped_cholesky(torch.ones(8, 8, dtype=torch.float64), 0.0)
    assert factor is not None
    assert 0 < factor.damping <= 1e-6
    assert factor.retries > 0


def test_matrix_with_nan_has_no_factor() -> None:
    H = moment()
    H[0, 0] = float("nan")
    assert damped_cholesky(H, 0.01) is None


def test_condition_is_the_ratio_of_the_extreme_eigenvalues() -> None:
    basis, _ = torch.linalg.qr(moment())
    H = basis @ torch.diag(torch.tensor([1000.0, 50, 20, 10, 5, 3, 2, 0.1], dtype=torch.float64)) @ basis.T
    factor = damped_cholesky(H, 0.0)
    assert factor is not None
    assert 0.99 * 1e4 <= condition(H, factor) <= 1.0001e4


def test_triangular_inverse_multiplies_out_to_the_identity() -> None:
    """An odd size, larger than the block that is solved at once."""
    n = 2 * SMALL + 3
    lower = torch.linalg.cholesky(moment(n) + n * torch.eye(n, dtype=torch.float64))
    found = triangular_inverse(lower)
    torch.testing.assert_close(found @ lower, torch.eye(n, dtype=torch.float64))
    assert not found.triu(1).any()


def test_the_factor_is_of_the_lower_triangle_in_its_order_and_leaves_h_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linalg, "PANEL", 3)
    H, order, ridge = moment(), torch.tensor([5, 0, 7, 2, 1, 6, 4, 3]), torch.arange(8.0, dtype=torch.float64)
    given = H + 1e-3 * torch.ones(8, 8, dtype=torch.float64).triu(1)  # rounding leaves H asymmetric
    for rows in (None, order):
        before = given.clone()
        factor = damped_cholesky(given, 0.0, rows, ridge)
        assert factor is not None
        assert torch.equal(given, before)
        own = given + ridge.diag() if rows is None else (given + ridge.diag())[rows[:, None], rows]
        assert torch.equal(factor.lower, torch.linalg.cholesky(own.tril() + own.tril(-1).T))
        right = torch.randn(8, 3, dtype=torch.float64)
        assert torch.equal(cholesky_solve(factor.lower, right), torch.cholesky_solve(right, factor.lower))


def test_a_large_inverse_is_computed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "LARGE", 10)
    monkeypatch.setattr(linalg, "PANEL", 4)
    lower = torch.linalg.cholesky(moment(37))
    wanted = triangular_inverse(lower)
    invert_triangular(lower)
    torch.testing.assert_close(lower, wanted, rtol=1e-12, atol=1e-12)
    assert not lower.triu(1).any()
