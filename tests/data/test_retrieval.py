"""Oracle: tables in the layout of BEIR, written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epmq_cli.data.retrieval import Retrieval
from epmq_cli.errors import ConfigError, DataError

DOCUMENTS = [{"_id": "a", "title": "Red", "text": "it is red"}, {"_id": 2, "title": "", "text": "blue"}]
DOCUMENTS += [{"_id": "c", "text": "green"}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(folder: Path, judged: str = "query-id\tcorpus-id\tscore\nq\ta\t2\nq\t2\t0\n", **options: Any) -> Retrieval:
    files = {"queries": [{"_id": "q", "text": "which is red?"}], "documents": DOCUMENTS}
    paths = {name: write(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    (folder / "judged.tsv").write_text(judged)
    return Retrieval(**{**paths, "train": str(folder / "judged.tsv"), "test": str(folder / "judged.tsv"), **options})


def test_scoring_reads_all_documents_and_calibration_the_relevant_ones(tmp_path: Path) -> None:
    own = source(tmp_path)
    test, train = own.load("test"), own.load("train", 5, seed=0)
    assert list(test.inputs) == [("which is red?", "Red it is red"), ("which is red?", "blue"), ("", "green")]
    assert test.labels is not None
    assert test.labels.tolist() == [2, 0, 0]
    assert list(train.inputs) == [("which is red?", "Red it is red")]
    assert own.check_first("test") == 2
    (tmp_path / "judged.tsv").write_text("query-id\tcorpus-id\nq\tc\n")  # without a score
    assert list(own.load("train").inputs) == [("which is red?", "green")]


@pytest.mark.parametrize(
    ("judged", "message"),
    [
        ("query-id\tcorpus-id\tscore\nq\tx\t1\n", "row 1: the id 'x' has no text; add its row to data.queries or"),
        (
            "query-id\tcorpus-id\tscore\nq\ta\tmuch\n",
            "column score must hold a number, the relevance, got 'much'",
        ),
        ("query\tdocument\nq\ta\n", "row 1: no value in column query-id; the columns are query, document"),
    ],
)
def test_damaged_tables_are_named(judged: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        source(tmp_path, judged).load("test")


def test_wrong_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.test must be a file ending in .tsv, .csv, .*, got qrels"):
        source(tmp_path, test="qrels")
    with pytest.raises(ConfigError, match="data.pair must be the columns of the query's and of the document's id"):
        source(tmp_path, pair="id")
