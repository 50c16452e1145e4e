"""Metrics of the order in which documents are found for a query: each is the mean over the queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from epmq_cli.data.ranking import Ranking
from epmq_cli.evaluate.metrics import Score

CHUNK = 64  # queries that are compared with all documents at a time


def ndcg(found: list[int], relevance: Mapping[int, float], most: int) -> float:
    """Normalized discounted cumulative gain of the first documents (Jarvelin and Kekalainen 2002,
    https://doi.org/10.1145/582415.582418), with the relevance itself as gain, as trec_eval has it."""
    ideal = sorted(relevance.values(), reverse=True)
    gains = [relevance.get(number, 0.0) for number in found]
    return _discounted(gains[:most]) / _discounted(ideal[:most])


def _discounted(gains: list[float]) -> float:
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains))


def recall(found: list[int], relevance: Mapping[int, float], most: int) -> float:
    """The share of the relevant documents among the first ones."""
    return len(relevance.keys() & {*found[:most]}) / len(relevance)


MEASURES: Mapping[str, Callable[[list[int], Mapping[int, float], int], float]] = {"ndcg": ndcg, "recall": recall}


def ranked_score(metric: str, ranking: Ranking, similarities: Callable[[slice], Tensor]) -> Score:
    """The mean of a metric such as ndcg@10 over queries, with its standard error. `similarities`: of some of the
    queries with all documents, (queries, documents)."""
    name, _, number = metric.partition("@")
    most, values = int(number), []
    for start in range(0, len(ranking.queries), CHUNK):
        some = slice(start, start + CHUNK)
        first = similarities(some).sort(dim=-1, descending=True, stable=True).indices[:, :most]
        for found, relevance in zip(first.tolist(), ranking.relevance[some], strict=True):
            values.append(MEASURES[name](found, relevance, most))
    every = torch.tensor(values, dtype=torch.float64)
    error = float(every.std()) / math.sqrt(len(every)) if len(every) > 1 else None
    return Score(float(every.mean()), error, len(every))
