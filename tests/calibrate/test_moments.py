"""Oracles: the sums written out; all in float64."""

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.moments import Moments, real_tokens, task_weight

IN, OUTS = 8, (6, 3)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_the_sums_written_out(weighted: bool) -> None:
    X, P = rand(30, IN, seed=0), [rand(30, out, seed=out) for out in OUTS]
    w = rand(30, seed=9).abs() if weighted else torch.ones(30, dtype=torch.float64)
    found = Moments(IN, OUTS, X.device)
    found.add(X, P, w if weighted else None)
    torch.testing.assert_close(found.xx, torch.einsum("n,ni,nj->ij", w, X, X))
    torch.testing.assert_close(found.x, torch.einsum("n,ni->i", w, X))
    assert found.tokens == pytest.approx(float(w.sum()))
    for part, px, p, pp in zip(P, found.px, found.p, found.pp, strict=True):
        torch.testing.assert_close(px, torch.einsum("n,no,ni->oi", w, part, X))
        torch.testing.assert_close(p, torch.einsum("n,no->o", w, part))
        assert pp == pytest.approx(float(torch.einsum("n,no,no->", w, part, part)))


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_batches_are_those_of_all_rows_at_once(weighted: bool) -> None:
    X, P, w = rand(30, IN, seed=0), rand(30, 6, seed=1), rand(30, seed=2).abs() if weighted else None
    whole, parts = Moments(IN, [6], X.device), Moments(IN, [6], X.device)
    whole.add(X, [P], w)
    start = 0
    for size in (7, 1, 22):
        rows = slice(start, start + size)
        parts.add(X[rows], [P[rows]], None if w is None else w[rows])
        start += size
    assert whole.tokens == pytest.approx(parts.tokens)
    for name in ("xx", "x", "px", "p"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))


def test_parts_that_are_not_given_are_zero() -> None:
    found = Moments(IN, OUTS, torch.device("cpu"))
    found.add(rand(5, IN, seed=0), [None, None], None)
    assert all(not px.any() and not p.any() for px, p in zip(found.px, found.p, strict=True))
    assert found.pp == [0.0, 0.0]


def test_padding_never_enters_the_rows() -> None:
    inputs = rand(2, 3, IN, seed=0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    kept = real_tokens(inputs, mask)
    assert torch.equal(kept, torch.stack([inputs[0, 0], inputs[0, 1], inputs[1, 0]]))
    assert real_tokens(inputs, None).shape == (6, IN)
    assert real_tokens(inputs[:, 0], None).shape == (2, IN)


def test_task_weights() -> None:
    moment = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert task_weight(moment, 10, "frobenius") == pytest.approx(1 / 5)
    assert task_weight(moment, 10, "tokens") == pytest.approx(1 / 10)
    assert task_weight(0 * moment, 10, "frobenius") == 0
