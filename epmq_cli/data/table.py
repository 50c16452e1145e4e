"""Text tasks from local files: tsv, csv, jsonl, json or parquet."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmq_cli.data.columns import Columns, columns
from epmq_cli.data.rows import READERS, Repeated
from epmq_cli.data.samples import Samples, Split
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.places import check_permitted, expanded

KINDS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Table:
    """A table with one sample a row, in the file `train` or `test`.

    `text`: the column of the text, or a list of two columns for pairs. `prompt`: a text with {column} places, instead
    of `text`. `label`: the column of the label. `labels`: the values of that column in the order of the classes; null
    where they are the whole numbers 0, 1, ... themselves. `regression`: labels are numbers, not classes.
    """

    train: str
    test: str
    text: str | Sequence[str] = "text"
    label: str = "label"
    labels: Sequence[str | int] | None = None
    prompt: str | None = None
    regression: bool = False

    def __post_init__(self) -> None:
        for path in (self.train, self.test):
            if Path(path).suffix.lower() not in KINDS:
                raise ConfigError(f"data.train and data.test must be files ending in {', '.join(KINDS)}, got {path}")
        _ = self.columns

    @property
    def columns(self) -> Columns:
        """The columns of a sample; ConfigError where they make none."""
        return columns("text", self.text, self.prompt, self.label, self.labels, self.regression)

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Rows of the split's file; DataError names the file, and the row where there is one."""
        path = expanded(self.train if split == "train" else self.test)
        rows = read_rows(path, self.columns.names)
        labels = self.columns.targets({self.label: [row[self.label] for row in rows]}, str(path))
        return Samples(self.columns.texts(rows, str(path)), labels).some(count, seed)


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file of one of the `KINDS`, each with at least these columns."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; data paths are taken from the folder that epmq was started in")
    check_permitted(path, DataError)
    kind = path.suffix.lower()
    try:
        rows = READERS[kind](path)
    except (UnicodeDecodeError, ValueError, OSError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {kind[1:]} in UTF-8 ({error})") from error
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) is None:
                found = ", ".join(map(str, row))
                raise DataError(f"{path}, row {number}: no value in column {column}; the columns are {found}")
            if isinstance(row[column], Repeated):
                raise DataError(f"{path}, row {number} has the column {column} twice; rename one of them")
    return rows
