"""Oracles: the definitions of NDCG and recall on a ranking of four documents, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from epmq_cli.data.ranking import RANKINGS, Ranking, some_queries
from epmq_cli.data.samples import Samples
from epmq_cli.evaluate.ranking import ranked_score

PAIRS = [("q", "far"), ("q", "near"), ("p", "near"), ("", "other"), ("p", "far"), ("q", "near"), ("lost", "other")]
GRADES = torch.tensor([3.0, 1.0, 2.0, 0.0, 0.0, 1.0, 0.0])
SIMILARITIES = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.2, 0.9]])  # of q and p with far, near and other


def ranking() -> Ranking:
    return Ranking.of(Samples(PAIRS, GRADES))


def test_pairs_become_queries_documents_and_relevance() -> None:
    found = ranking()
    assert (found.queries, found.documents) == (["q", "p"], ["far", "near", "other"])
    assert found.relevance == [{0: 3.0, 1: 1.0}, {1: 2.0}]
    assert Ranking.of(Samples(PAIRS[:2])).relevance == [{0: 1.0, 1: 1.0}]  # without labels all are relevant


def test_metrics_are_those_of_the_definition() -> None:
    """q finds near, other, far; p other, far, near, of which the last two are equally near."""
    q = (1 + 3 / math.log2(4)) / (3 + 1 / math.log2(3))
    p = (2 / math.log2(4)) / 2
    wanted = {"ndcg@10": [q, p], "recall@1": [0.5, 0.0], "recall@10": [1.0, 1.0], "recall@100": [1.0, 1.0]}
    assert wanted.keys() == {*RANKINGS}
    for metric, values in wanted.items():
        score = ranked_score(metric, ranking(), lambda some: SIMILARITIES[some])
        assert score.value == pytest.approx(sum(values) / 2)
        assert score.error == pytest.approx(abs(values[0] - values[1]) / 2)
        assert score.samples == 2


def test_draws_keep_all_documents() -> None:
    whole = Samples(PAIRS, GRADES)
    drawn = Ranking.of(some_queries(whole, 1, seed=3))
    assert len(drawn.queries) == 1
    assert drawn.documents == ranking().documents
    assert some_queries(whole, None, seed=3) is whole is some_queries(whole, 3, seed=3)
