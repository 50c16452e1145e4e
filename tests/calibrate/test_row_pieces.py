"""Oracles: every row once, and the results of whole matrices."""

from __future__ import annotations

import pytest
import torch

from epmq_cli.calibrate import row_pieces as pieces
from epmq_cli.calibrate.embeddings import solved_table
from epmq_cli.calibrate.held_out_step import best_step
from epmq_cli.calibrate.moments import Measure, frobenius
from epmq_cli.calibrate.row_pieces import cached_pieces, row_pieces
from epmq_cli.calibrate.sharing import ALONE
from tests.helpers.objectives import IN, OUT, given_problem, rand


def results() -> dict[str, torch.Tensor]:
    """What is computed from large matrices, some rows at a time."""
    given = given_problem(rich=True)
    problem, held = given.problem(0.05, True), given.problem(0.0, True)
    weight, solved = problem.solve()
    other = weight + 0.1 * rand(OUT, IN, seed=1)
    step = best_step(other, held, given.anchor.weight)
    measure, factor = Measure(), rand(OUT, IN, seed=2)
    measure.add_drift(rand(20, IN, seed=3), rand(20, IN, seed=4), None)
    moments, bias = measure.moments(factor), problem.bias(other)
    assert bias is not None
    tables = [rand(OUT, IN, seed=t) for t in (5, 6)]
    counts = [rand(OUT, seed=t).abs() for t in (7, 8)]
    return {
        "weight": weight,
        "bias": bias,
        "loss": problem.loss(other, weight, solved),
        "energy": problem.energy(),
        "step": torch.tensor([step.share, frobenius(ALONE, moments.xx, held.H)]),
        "xp": moments.xp,
        "pp": moments.pp,
        "table": solved_table(given.anchor.weight, tables, counts, 0.1),
    }


def test_pieces_are_all_rows_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LEAST", 2)
    monkeypatch.setattr(pieces, "PIECE", 30)
    assert list(row_pieces(slice(1, 9), 10)) == [slice(1, 4), slice(4, 7), slice(7, 9)]
    assert list(row_pieces(slice(0, 3), 1000)) == [slice(0, 2), slice(2, 3)]
    assert list(row_pieces(slice(4, 4), 10)) == [slice(4, 4)]  # a process without rows
    monkeypatch.setattr(pieces, "CACHED", 30)
    assert list(cached_pieces(torch.zeros(7, 10))) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(cached_pieces(torch.zeros(2, 100))) == [slice(0, 1), slice(1, 2)]
    monkeypatch.setattr(pieces, "PIECE", 50)
    assert list(cached_pieces(torch.zeros(7, 10, device="meta"))) == [slice(0, 5), slice(5, 7)]  # as on a GPU


def test_pieces_give_the_results_of_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = results()
    monkeypatch.setattr(pieces, "LEAST", 1)
    monkeypatch.setattr(pieces, "PIECE", 2 * IN)
    monkeypatch.setattr(pieces, "CACHED", 2 * IN)
    assert len(list(row_pieces(slice(0, OUT), IN))) == len(list(cached_pieces(torch.zeros(OUT, IN)))) == 3
    torch.testing.assert_close(results(), whole, rtol=1e-12, atol=1e-12)
