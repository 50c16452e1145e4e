"""Oracle: the sums written out; all in float64."""

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.moments import PANEL, Measure, Products, real_tokens, task_weight
from epmq_cli.calibrate.sharing import ALONE

IN, OUT = 8, 9


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_the_sums_written_out(weighted: bool) -> None:
    X, P = rand(30, IN, seed=0), rand(30, OUT, seed=1)
    w = rand(30, seed=9).abs() if weighted else torch.ones(30, dtype=torch.float64)
    measure = Measure()
    measure.add(X, P, w if weighted else None)
    found = measure.moments()
    torch.testing.assert_close(found.xx, torch.einsum("n,ni,nj->ij", w, X, X))
    torch.testing.assert_close(found.x, torch.einsum("n,ni->i", w, X))
    assert found.tokens == pytest.approx(float(w.sum()))
    assert found.norm == pytest.approx(float(found.xx.norm()))
    torch.testing.assert_close(found.xp, torch.einsum("n,ni,no->io", w, X, P))
    torch.testing.assert_close(found.p, torch.einsum("n,no->o", w, P))
    torch.testing.assert_close(found.pp, torch.einsum("n,no,no->o", w, P, P))


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_batches_are_those_of_all_rows_at_once(weighted: bool) -> None:
    X, P, w = rand(30, IN, seed=0), rand(30, OUT, seed=1), rand(30, seed=2).abs() if weighted else None
    at_once, in_parts = Measure(), Measure()
    at_once.add(X, P, w)
    start = 0
    for size in (7, 1, 22):
        rows = slice(start, start + size)
        in_parts.add(X[rows], P[rows], None if w is None else w[rows])
        start += size
    whole, parts = at_once.moments(), in_parts.moments()
    assert whole.tokens == pytest.approx(parts.tokens)
    for name in ("xx", "x", "xp", "p", "pp"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_gives_the_same_moments_as_its_parts(weighted: bool) -> None:
    """p = W d, so xp, p and pp are those of the parts written out."""
    X, drift, w = rand(30, IN, seed=0), rand(30, IN, seed=1), rand(30, seed=2).abs() if weighted else None
    W = rand(OUT, IN, seed=3)
    written, measured = Measure(), Measure()
    for rows in (slice(0, 13), slice(13, 30)):
        weight = None if w is None else w[rows]
        written.add(X[rows], drift[rows] @ W.T, weight)
        measured.add_drift(X[rows], drift[rows], weight)
    one, other = written.moments(), measured.moments(W)
    for name in ("xx", "x", "xp", "p", "pp"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_sums_do_not_depend_on_the_number_or_order_of_batches() -> None:
    """The sums are equal in any order, bit for bit; the float64 product differs only by float32 rounding within a
    batch."""
    rows = (1 + 0.1 * rand(200_000, 4, seed=0)).float()
    forward, backward = Products(ALONE), Products(ALONE)
    for part in rows.split(1000):
        forward.add_square(part)
    for part in reversed(rows.split(1000)):
        backward.add_square(part)
    found = forward.square_rows()
    assert torch.equal(found, backward.square_rows())
    torch.testing.assert_close(found, rows.double().T @ rows.double(), rtol=1e-6, atol=0)


def test_a_square_wider_than_its_panels_is_complete() -> None:
    rows = rand(20, 2 * PANEL + 3, seed=0)
    products = Products(ALONE)
    products.add_square(rows)
    torch.testing.assert_close(products.square_rows(), rows.T @ rows)


def test_a_missing_part_is_zero() -> None:
    measure = Measure()
    measure.add(rand(5, IN, seed=0), None, None)
    found = measure.moments()
    assert not any(part.any() for part in (found.xp, found.p, found.pp))


def test_padding_never_enters_the_rows() -> None:
    inputs = rand(2, 3, IN, seed=0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    kept = real_tokens(inputs, mask)
    assert torch.equal(kept, torch.stack([inputs[0, 0], inputs[0, 1], inputs[1, 0]]))
    assert real_tokens(inputs, None).shape == (6, IN)
    assert real_tokens(inputs[:, 0], None).shape == (2, IN)


def test_task_weights() -> None:
    assert task_weight(5.0, 10, "frobenius") == pytest.approx(1 / 5)
    assert task_weight(5.0, 10, "tokens") == pytest.approx(1 / 10)
    assert task_weight(0.0, 10, "frobenius") == 0
