"""Queries and the documents to find for them, from pairs of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epmq_cli.data.samples import Samples

RANKINGS = ("ndcg@10", "recall@1", "recall@10", "recall@100")
"""The metrics of the order of documents."""


@dataclass(frozen=True)
class Ranking:
    """Queries, documents, and the relevance of documents for each query, by number; above 0."""

    queries: Sequence[str]
    documents: Sequence[str]
    relevance: Sequence[Mapping[int, float]]

    @classmethod
    def of(cls, samples: Samples) -> Ranking:
        """Of pairs of a query and a document, whose labels are their relevance; 1 without labels, and not relevant from
        0 down. Equal texts are one. A pair with an empty query only adds its document. Queries without a relevant
        document are left out."""
        grades = [1.0] * len(samples) if samples.labels is None else samples.labels.tolist()
        documents: dict[str, int] = {}
        relevance: dict[str, dict[int, float]] = {}
        for (query, document), grade in zip(samples.inputs, grades, strict=True):
            number = documents.setdefault(document, len(documents))
            if query and grade > 0:
                own = relevance.setdefault(query, {})
                own[number] = max(float(grade), own.get(number, 0.0))
        return cls([*relevance], [*documents], [*relevance.values()])


def some_queries(samples: Samples, count: int | None, seed: int) -> Samples:
    """The pairs of `count` queries, drawn by the seed, and the documents of all others; all without a count."""
    queries = [*dict.fromkeys(query for query, _ in samples.inputs if query)]
    if count is None or count >= len(queries):
        return samples
    import torch

    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    drawn = {queries[place] for place in order}
    return replace(samples, inputs=[(query if query in drawn else "", document) for query, document in samples.inputs])
