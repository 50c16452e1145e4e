"""Text tasks from local tables: tsv, csv, jsonl, json or parquet."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmq_cli.data.columns import Columns, columns
from epmq_cli.data.labels import WITHOUT
from epmq_cli.data.rows import READERS, SMALL, Repeated, Row, read_first
from epmq_cli.data.samples import Samples, Split
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.runtime.paths import check_permitted, expanded

KINDS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Table:
    """Tables with one sample per row, in the files `train` and `test`.

    `text`: the column of the text, or a list of two columns for pairs. `prompt`: a text with {column} placeholders,
    instead of `text`. `label`: the column of the label, which the train file need not have; null if there is none.
    `labels`: the values of that column in the order of the classes; null if they are the whole numbers 0, 1, ...
    `regression`: whether labels are numbers instead of classes. `answer`: the column of the text that answers are
    compared with, instead of `label`.
    """

    train: str
    test: str
    text: str | Sequence[str] = "text"
    label: str | None = "label"
    labels: Sequence[str | int | bool] | None = None
    prompt: str | None = None
    regression: bool = False
    answer: str | None = None

    def __post_init__(self) -> None:
        for path in (self.train, self.test):
            if Path(path).suffix.lower() not in KINDS:
                raise ConfigError(f"data.train and data.test must be files ending in {', '.join(KINDS)}, got {path}")
        _ = self.columns

    @property
    def columns(self) -> Columns:
        """The columns of a sample; ConfigError if they do not make one."""
        return columns("text", self.text, self.prompt, self.label, self.labels, self.regression, self.answer)

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Rows of the split's file; the DataError names the file and the row."""
        path = expanded(self.train if split == "train" else self.test)
        rows = read_rows(path, self.columns)
        values = self._label_values(rows, path, split)
        labels, classes = self.columns.targets(values, str(path), split)
        references = self.columns.references(values, str(path), split)
        return Samples(self.columns.texts(rows, str(path)), labels, classes, references).some(count, seed)

    def check_first(self, split: Split) -> int:
        """See CheckedSource."""
        path = expanded(self.train if split == "train" else self.test)
        rows = read_rows(path, self.columns, read_first)
        if split == "test" and rows:
            self.columns.check_targets(self._label_values(rows, path, split), str(path))
        inputs = self.columns.texts(rows, str(path))
        return len(inputs) or int(path.stat().st_size > SMALL)

    def _label_values(self, rows: Sequence[Mapping[str, Any]], path: Path, split: Split) -> dict[str, list[Any]]:
        """The values of the label's column, by its name; DataError if the test file lacks the column."""
        label, option = self.columns.label, "data.answer" if self.answer else "data.label"
        if label is None or (rows and not any(label in row for row in rows)):
            if label is not None and split == "test":
                names = ", ".join(str(column) for column in rows[0] if column is not None)
                raise DataError(f"{path} has no column {label} ({option}); its columns are {names}; {WITHOUT}")
            return {}
        values = [row.get(label) for row in rows]
        for number, value in enumerate(values, 1):
            if split == "test" and isinstance(value, Repeated):
                raise DataError(f"{path}, row {number} has the column {label} twice; rename one of them")
        return {label: values}


def read_rows(path: Path, columns: Columns, read: Callable[[Path], list[Row]] | None = None) -> list[Row]:
    """The rows of a file of one of the `KINDS`, which `read` reads; DataError if a row lacks an input."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; relative data paths start from the folder where epmq runs")
    check_permitted(path, DataError)
    kind = path.suffix.lower()
    try:
        rows = (read or READERS[kind])(path)
    except (UnicodeDecodeError, ValueError, OSError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {kind[1:]} in UTF-8 ({error})") from error
    inputs = columns.of(rows[0], str(path)).inputs if rows else ()
    for number, row in enumerate(rows, 1):
        for column in inputs:
            if row.get(column) is None:
                names = ", ".join(map(str, row))
                raise DataError(f"{path}, row {number}: no value in column {column}; the columns are {names}")
            if isinstance(row[column], Repeated):
                raise DataError(f"{path}, row {number} has the column {column} twice; rename one of them")
    return rows
