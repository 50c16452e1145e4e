"""Reads the rows of table files: tsv, csv, json, jsonl or parquet. Values keep the types that they are stored in."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from epmq_cli.data.quotes import are_syntax
from epmq_cli.errors import DataError

Row = dict[str, Any]
FIRST = 16
"""The rows that a check reads of a large file."""
SMALL = 1 << 20
"""Bytes of a file that a check reads whole."""
LONGEST = (1 << 31) - 1  # characters of one field; the default of Python's csv is 131072
WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""The byte order marks of files in another encoding."""

BETWEEN = re.compile("[ \t\r\n,\ufeff]*")
"""The characters between two JSON values: line ends, commas, and byte order marks of concatenated files."""


class Repeated:
    """The value of a column that a row has more than once."""


def decoded(content: bytes) -> str:
    """The content of a file as text in UTF-8, without a byte order mark; ValueError if it is in another encoding or not
    text."""
    wide = next((name for mark, name in WIDE.items() if content.startswith(mark)), None)
    if wide:
        raise ValueError(f"it is in {wide}; save it in UTF-8")
    position = content.find(b"\0")
    if position >= 0:
        line = content.count(b"\n", 0, position) + 1
        raise ValueError(f"line {line} holds a NUL byte, as in binary or UTF-16 files")
    return content.decode("utf-8-sig")


def read_tsv(path: Path) -> list[Row]:
    """The rows of a tsv file, whose fields may be quoted (see `quotes`)."""
    text = decoded(path.read_bytes())
    if are_syntax(text, path):
        return _delimited(text, delimiter="\t", strict=True)
    return _delimited(text, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_csv(path: Path) -> list[Row]:
    """The rows of a csv file."""
    return _delimited(decoded(path.read_bytes()), strict=True)


def _delimited(text: str, **options: Any) -> list[Row]:
    return list(_rows(text, **options))


def _rows(text: str, **options: Any) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)
    reader = csv.reader(io.StringIO(text, newline=""), **options)
    filled = (fields for fields in reader if fields)
    header = next(filled, [])
    twice = {name: Repeated() for name in header if header.count(name) > 1}
    for number, fields in enumerate(filled, 1):
        if len(fields) > len(header):
            raise ValueError(f"row {number} has {len(fields)} fields, but the header has {len(header)} columns")
        row = dict(zip_longest(header, fields))
        yield row | twice if twice else row


def read_json(path: Path) -> list[Row]:
    """The rows of a file with JSON lines, arrays of objects, or both."""
    return list(_objects(decoded(path.read_bytes())))


def _objects(text: str) -> Iterator[Row]:
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    position = BETWEEN.match(text, 0).end()  # type: ignore[union-attr]
    while position < len(text):
        value, end = decoder.raw_decode(text, position)
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                line = text.count("\n", 0, position) + 1
                raise ValueError(f"every line must be a JSON object, but line {line} holds {json.dumps(row)[:40]}")
            yield row
        position = BETWEEN.match(text, end).end()  # type: ignore[union-attr]


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        row |= {name: Repeated() for name in row if names.count(name) > 1}
    return row


def read_parquet(path: Path) -> list[Row]:
    """The rows of a parquet file; nested columns become lists and dicts."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow; install it with pip install 'epmq-cli[tables]'") from error
    with pyarrow.parquet.ParquetFile(path) as file:
        table = file.read()
    rows: list[Row] = table.to_pylist()
    twice = {name: Repeated() for name in table.column_names if table.column_names.count(name) > 1}
    return [row | twice for row in rows] if twice else rows


READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
}


def read_first(path: Path) -> list[Row]:
    """The rows of a small file; of a larger one the first rows, or none where only the whole file tells them: in
    parquet files, and in tsv files with quotes."""
    kind = path.suffix.lower()
    if path.stat().st_size <= SMALL:
        return READERS[kind](path)
    if kind == ".parquet":
        return []
    with path.open("rb") as file:
        content = file.read(SMALL)
    if kind in (".json", ".jsonl"):
        text = decoded(content.rpartition(b"}")[0] + b"}")
        return _until_cut(_objects(text.removeprefix("[")))
    text = decoded(content.rpartition(b"\n")[0])
    if kind == ".tsv":
        return [] if '"' in text else list(islice(_rows(text, delimiter="\t", quoting=csv.QUOTE_NONE), FIRST))
    return _until_cut(_rows(text, strict=True))


def _until_cut(rows: Iterator[Row]) -> list[Row]:
    """The first rows, up to the place where a row is cut."""
    first = list[Row]()
    with suppress(ValueError, csv.Error):
        first.extend(islice(rows, FIRST))
    return first
