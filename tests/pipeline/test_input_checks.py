"""Oracle: `load` of the same source, which refuses what the check of the first samples refuses, in the same words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from epmq_cli.data.documents import Documents
from epmq_cli.data.images import ImageFolder, Npz
from epmq_cli.data.rows import SMALL
from epmq_cli.data.samples import CheckedSource
from epmq_cli.data.table import Table
from epmq_cli.errors import DataError
from epmq_cli.pipeline.input_checks import check_source

LONG = "x" * (SMALL // 20)
"""A text of which 20 are more than a check reads."""


def table(kind: str, text: str, **options: Any) -> Callable[[Path], CheckedSource]:
    def source(folder: Path) -> CheckedSource:
        (folder / f"rows.{kind}").write_text(text)
        return Table(str(folder / "rows.tsv"), str(folder / f"rows.{kind}"), **options)

    return source


def pictures(folder: Path) -> CheckedSource:
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        Image.new("RGB", (4, 4)).save(folder / name / "1.png")
    (folder / "dog" / "1.png").write_bytes(b"no picture")
    return ImageFolder(str(folder), str(folder))


def arrays(folder: Path) -> CheckedSource:
    np.savez(folder / "x.npz", test_images=np.zeros((2, 4, 4), np.float32), test_labels=np.zeros(2, np.int64))
    return Npz(str(folder / "x.npz"))


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


REFUSED: dict[str, Callable[[Path], CheckedSource]] = {
    "no file": lambda folder: Table(str(folder / "a.csv"), str(folder / "b.csv")),
    "no text": table("csv", "label,txt\n0,red\n"),
    "no label": table("csv", "text\nred\n"),
    "a label in words": table("tsv", "text\tlabel\nred\tyes\n"),
    "a label that is not listed": table("jsonl", lines({"text": "red", "label": "no"}), labels=["yes", "maybe"]),
    "a number": table("jsonl", lines({"text": 3, "label": 0})),
    "no json": table("jsonl", '{"text": '),
    "a large csv": table("csv", "text,label\n" + f"{LONG},a\n" * 30),
    "a large tsv": table("tsv", "text\tlabel\n" + f"{LONG}\ta\n" * 30),
    "a large array": table("json", json.dumps([{"text": LONG, "label": "a"}] * 30)),
    "no document": lambda folder: Documents(str(folder / "a.txt"), str(folder / "b.txt")),
    "a document that is a list": lambda folder: Documents(
        str(folder / "a.txt"), str(_written(folder / "b.jsonl", lines({"text": ["a"]})))
    ),
    "no picture": pictures,
    "no folder": lambda folder: ImageFolder(str(folder / "a"), str(folder / "b")),
    "arrays of floats": arrays,
}


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_first_samples_are_refused_in_the_words_of_load(case: str, tmp_path: Path) -> None:
    source: Any = REFUSED[case](tmp_path)
    with pytest.raises(DataError) as early:
        check_source("colours", "test", source)
    with pytest.raises(DataError) as late:
        list(source.load("test").inputs)
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_of_large_files_only_the_first_rows_are_read(kind: str, tmp_path: Path) -> None:
    rows = [{"text": LONG, "label": 0}] * 30 + [{"text": LONG, "label": "a"}]
    mark = "\t" if kind == "tsv" else ","
    content = {
        "json": json.dumps(rows),
        "jsonl": lines(*rows),
    }.get(kind, f"text{mark}label\n" + "".join(f"{row['text']}{mark}{row['label']}\n" for row in rows))
    source: Any = table(kind, content)(tmp_path)
    check_source("colours", "test", source)
    with pytest.raises(DataError):
        source.load("test")


def test_a_split_without_rows_has_no_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task colours has no test samples to score on"):
        check_source("colours", "test", table("csv", "text,label\n")(tmp_path))
