"""Queries, documents and the relevance of one for the other in three tables, as BEIR has them
(https://github.com/beir-cellar/beir)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from epmq_cli.data.columns import columns
from epmq_cli.data.rows import Row, read_first
from epmq_cli.data.samples import Samples, Split
from epmq_cli.data.table import KINDS, read_rows
from epmq_cli.data.texts import check_text, text_of
from epmq_cli.errors import ConfigError, DataError, literal
from epmq_cli.runtime.paths import expanded

TITLE = "title"
"""The column of documents whose text, if there is one, comes before that of the document."""

Read = Callable[[Path], list[Row]]


@dataclass(frozen=True)
class Retrieval:
    """Tables with one row per query (`queries`), per document (`documents`), and per pair of both that is judged
    (`train`, `test`).

    `id`, `text`: the columns of queries and documents. `pair`: the columns of a pair, with the ids of its query and its
    document. `relevance`: the column of its relevance, above 0 for documents that answer the query; 1 without it.
    Scoring searches all documents, calibration reads the pairs that are relevant.
    """

    queries: str
    documents: str
    train: str
    test: str
    id: str = "_id"
    text: str = "text"
    pair: Sequence[str] = ("query-id", "corpus-id")
    relevance: str = "score"

    def __post_init__(self) -> None:
        for name in ("queries", "documents", "train", "test"):
            if Path(path := getattr(self, name)).suffix.lower() not in KINDS:
                raise ConfigError(f"data.{name} must be a file ending in {', '.join(KINDS)}, got {path}")
        if isinstance(self.pair, str) or len(self.pair) != 2:
            raise ConfigError(
                f"data.pair must be the columns of the query's and of the document's id, got {literal(self.pair)}"
            )

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Pairs (query, document) with their relevance; of the test split also the documents of no pair, each with an
        empty query. DataError if a table lacks a column or an id."""
        texts = {name: self._texts(name) for name in ("queries", "documents")}
        pairs, grades = [], []
        for query, document, grade, where in self._pairs(split):
            if split == "test" or grade > 0:
                pairs.append((_found(texts["queries"], query, where), _found(texts["documents"], document, where)))
                grades.append(grade)
        if split == "test":
            judged = {document for _, document in pairs}
            rest = [("", document) for document in texts["documents"].values() if document not in judged]
            pairs, grades = [*pairs, *rest], [*grades, *[0.0] * len(rest)]
        return Samples(pairs, torch.tensor(grades, dtype=torch.float32)).some(count, seed)

    def check_first(self, split: Split) -> int:
        """See CheckedSource."""
        for name in ("queries", "documents"):
            self._texts(name, read_first)
        return len(self._pairs(split, read_first))

    def _texts(self, name: str, read: Read | None = None) -> Mapping[str, str]:
        """The texts of queries or documents, by id."""
        path, texts = expanded(getattr(self, name)), dict[str, str]()
        wanted = columns("text", [self.id, self.text], None, None, None, False)
        for number, row in enumerate(read_rows(path, wanted, read), 1):
            where = f"{path}, row {number}"
            title = row.get(TITLE)
            text = text_of(row[self.text], self.text, where)
            titled = f"{check_text(title, where)} {text}".strip() if isinstance(title, str) else text
            texts[str(row[self.id])] = titled
        return texts

    def _pairs(self, split: Split, read: Read | None = None) -> list[tuple[str, str, float, str]]:
        """The ids of a query and a document, their relevance, and the place of each pair."""
        path = expanded(self.train if split == "train" else self.test)
        found = []
        for number, row in enumerate(read_rows(path, columns("pair", self.pair, None, None, None, False), read), 1):
            where = f"{path}, row {number}"
            query, document = (str(row[name]) for name in self.pair)
            found.append((query, document, _grade(row.get(self.relevance, 1), self.relevance, where), where))
        return found


def _found(texts: Mapping[str, str], id: str, where: str) -> str:
    if id not in texts:
        raise DataError(f"{where}: the id {literal(id)} has no text; add its row to data.queries or data.documents")
    return texts[id]


def _grade(value: object, column: str, where: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: column {column} must hold a number, the relevance, got {literal(value)}")
    return number
