"""Decides whether the quotes in a tsv file are syntax or text.

Both are common. In the files of GLUE quotes are text, and a field may begin with a quote that is never closed. pandas,
Excel and others quote a field that holds a tab, a line end or a quote, and double the quotes in it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from epmq_cli.runtime.console import log, say

Rows = Sequence[Sequence[str]]

STARTS = re.compile('(?:^|[\t\n\r])"')  # a field that begins with a quote
ENDS = re.compile("\r\n|\r")

WRITERS: tuple[Callable[[str], bool], ...] = (
    lambda field: any(mark in field for mark in '\t\n\r"'),  # Python's csv and pandas
    lambda field: any(mark in field for mark in '\t\n\r",'),  # Excel
    lambda field: not _is_number(field),  # R, LibreOffice
    lambda field: field != "" and not _is_number(field),
    lambda field: True,
    lambda field: field != "",
)
"""The fields that a program quotes, for each known convention."""


def are_syntax(text: str, path: Path) -> bool:
    """Whether the quotes of a tsv file are syntax. Reports the decision if the two readings differ.

    Quotes are syntax if only this reading gives each row as many fields as the header, or if the text is exactly what
    a program writes for these fields. `path`: the file, for messages.
    """
    if not STARTS.search(text):
        return False
    lines = [line for line in _lines(text).split("\n") if line]
    plain, quoted = [line.split("\t") for line in lines], _quoted(text)
    written = quoted is not None and any(_is_written(quoted, needs, "\n".join([*lines, ""])) for needs in WRITERS)
    if quoted is not None and (not _is_even(plain) or (written and len(plain) == len(quoted))):
        say(f"{path}: the quotes around fields are read as syntax, as pandas writes them, not as part of the text")
        return True
    if written or all(_is_wrapped(field) for row in plain for field in row if '"' in field):
        log.warning(
            "%s: the quotes around fields are read as part of the text; if they are not, save the file as csv or jsonl",
            path,
        )
    return False


def _quoted(text: str) -> Rows | None:
    """The rows if quotes are syntax; None if the file cannot be read that way."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True) if row]
    except csv.Error:
        return None
    return rows if _is_even(rows) else None


def _is_even(rows: Rows) -> bool:
    """Whether each row has as many fields as the first."""
    return len({len(row) for row in rows}) == 1


def _is_wrapped(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


def _lines(text: str) -> str:
    return ENDS.sub("\n", text)


def _is_written(rows: Rows, needs: Callable[[str], bool], text: str) -> bool:
    """Whether the text is what a program writes that quotes the fields for which `needs` is true."""
    position = 0
    for row in rows:
        line = _lines("\t".join(_field(field) if needs(field) else field for field in row)) + "\n"
        if not text.startswith(line, position):
            return False
        position += len(line)
    return position == len(text)


def _field(field: str) -> str:
    doubled = field.replace('"', '""')
    return f'"{doubled}"'


def _is_number(field: str) -> bool:
    try:
        float(field)
        return True
    except ValueError:
        return False
