"""Text tasks from local files: tsv, csv, jsonl or parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmq_cli.data.columns import Columns, columns
from epmq_cli.data.labels import WITHOUT
from epmq_cli.data.samples import Samples, Split
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.places import check_permitted, expanded

KINDS = (".tsv", ".csv", ".jsonl", ".parquet")
LONGEST = (1 << 31) - 1  # characters of one field, of which Python's csv takes 131072 unless told


@dataclass(frozen=True)
class Table:
    """A table with one sample a row, in the file `train` or `test`.

    `text`: the column of the text, or a list of two columns for pairs. `prompt`: a text with {column} places, instead
    of `text`. `label`: the column of the label, which the train file need not have; null where there is none.
    `labels`: the values of that column in the order of the classes; null where they are the whole numbers 0, 1, ...
    themselves. `regression`: labels are numbers, not classes.
    """

    train: str
    test: str
    text: str | Sequence[str] = "text"
    label: str | None = "label"
    labels: Sequence[str | int | bool] | None = None
    prompt: str | None = None
    regression: bool = False

    def __post_init__(self) -> None:
        for path in (self.train, self.test):
            if Path(path).suffix not in KINDS:
                raise ConfigError(f"data.train and data.test must be files ending in {', '.join(KINDS)}, got {path}")
        _ = self.columns

    @property
    def columns(self) -> Columns:
        """The columns of a sample; ConfigError where they make none."""
        return columns("text", self.text, self.prompt, self.label, self.labels, self.regression)

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Rows of the split's file; DataError names the file, and the row where there is one."""
        path = expanded(self.train if split == "train" else self.test)
        rows = read_rows(path, self.columns.inputs)
        labels, classes = self.columns.targets(self._label_values(rows, path, split), str(path), split)
        return Samples(self.columns.texts(rows, str(path)), labels, classes).some(count, seed)

    def _label_values(self, rows: Sequence[Mapping[str, Any]], path: Path, split: Split) -> dict[str, list[Any]]:
        """The values of the label's column, by its name; DataError where the test file has no such column."""
        if self.label is None or (rows and not any(self.label in row for row in rows)):
            if self.label is not None and split == "test":
                found = ", ".join(str(column) for column in rows[0] if column is not None)
                raise DataError(
                    f"{path} has no column {self.label}, which data.label names; its columns are {found}; {WITHOUT}"
                )
            return {}
        return {self.label: [row.get(self.label) for row in rows]}


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file of one of the `KINDS`, each with at least these columns."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; data paths are taken from the folder that epmq was started in")
    check_permitted(path, DataError)
    try:
        rows = _READERS[path.suffix](path)
    except (UnicodeDecodeError, ValueError, OSError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {path.suffix[1:]} in UTF-8 ({error})") from error
    for number, row in enumerate(rows, 1):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            found = ", ".join(str(column) for column in row if column is not None)
            raise DataError(f"{path}, row {number}: no value in column {missing[0]}; the columns are {found}")
    return rows


def _read_delimited(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file, strict=True))
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every line must be a JSON object")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow; install it with pip install 'epmq-cli[tables]'") from error
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


_READERS = {".tsv": _read_delimited, ".csv": _read_delimited, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
