"""Oracle: files written by the test, by csv, json and pyarrow."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from epmq_cli.data.documents import Documents
from epmq_cli.data.table import Table
from epmq_cli.errors import ConfigError, DataError

ROWS = [{"text": 'a "quoted" one', "label": 1}, {"text": "comma, and ünïcode", "label": 0}, {"text": "", "label": 2}]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = ["\t".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join(["\t".join(rows[0]), *lines]) + "\n", encoding="utf-8")
    return path


def table(path: Path, **fields: Any) -> Table:
    return Table(train=str(path), test=str(path), **fields)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_every_kind_returns_the_rows(kind: str, tmp_path: Path) -> None:
    samples = table(write(tmp_path / f"x.{kind}")).load("train")
    assert list(samples.inputs) == [row["text"] for row in ROWS]
    assert samples.labels.tolist() == [1, 0, 2]


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_long_texts_and_odd_line_ends(kind: str, tmp_path: Path) -> None:
    rows = [{"text": "word " * 40_000, "label": 0}, {"text": "one\u2028line\x85still", "label": 1}]
    path = write(tmp_path / f"x.{kind}", rows)
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert list(table(path).load("train").inputs) == [row["text"] for row in rows]


def test_splits_are_different_files(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.tsv"), write(tmp_path / "b.tsv", ROWS[:1])
    source = Table(train=str(train), test=str(test))
    assert (len(source.load("train")), len(source.load("test"))) == (3, 1)


def test_pairs_and_named_labels(tmp_path: Path) -> None:
    rows = [{"premise": "p1", "hypothesis": "h1", "gold": "no"}, {"premise": "p2", "hypothesis": "h2", "gold": "yes"}]
    path = write(tmp_path / "x.csv", rows)
    samples = table(path, text=["premise", "hypothesis"], label="gold", labels=["yes", "no"]).load("test")
    assert list(samples.inputs) == [("p1", "h1"), ("p2", "h2")]
    assert samples.labels.tolist() == [1, 0]


def test_prompts_regression_counts_and_seeds(tmp_path: Path) -> None:
    rows = [{"first": f"a {i}", "second": "{b}", "label": i / 2} for i in range(5)]
    source = table(write(tmp_path / "x.csv", rows), prompt="Is '{first}' like \"{second}\"?", regression=True)
    samples = source.load("train", 2)
    assert list(samples.inputs) == ["Is 'a 0' like \"{b}\"?", "Is 'a 1' like \"{b}\"?"]
    assert samples.labels.tolist() == [0.0, 0.5]
    drawn = source.load("train", 3, seed=1)
    assert list(drawn.inputs) == list(source.load("train", 5, seed=1).inputs)[:3]
    assert [f"Is 'a {int(2 * label)}'" for label in drawn.labels] == [text[:8] for text in drawn.inputs]
    with pytest.raises(DataError, match="with data.regression every label must be a finite number, got 'a 0'"):
        table(tmp_path / "x.csv", label="first", text="second", regression=True).load("test")


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (
            "label\ttext\n1\tx\n",
            {"text": "sentence"},
            r"x.tsv, row 1: no value in column sentence; the columns are label, text",
        ),
        ("label\ttext\n1\tx\n0\n", {}, r"row 2: no value in column text"),
        ("label\ttext\nspam\tx\n", {}, r"whole numbers from 0, got 'spam'; list the values in data.labels"),
        ("label\ttext\nspam\tx\n", {"labels": ["ham"]}, r"label 'spam' is not among data.labels, which are ham"),
    ],
)
def test_bad_tables_are_named(content: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text(content)
    with pytest.raises(DataError, match=message):
        table(tmp_path / "x.tsv", **fields).load("test")


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_bytes_of_another_kind_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"x.{kind}").write_bytes(b"label\ttext\n1\t\xff\xfe\n")
    with pytest.raises(DataError, match=f"cannot be read as {kind} in UTF-8"):
        table(tmp_path / f"x.{kind}").load("train")


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="a.jsonl cannot be read as jsonl in UTF-8"):
        Table(str(path), str(path)).load("train")


def test_json_lines_must_be_objects(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("[1, 2]\n")
    with pytest.raises(DataError, match="every line must be a JSON object"):
        table(tmp_path / "x.jsonl").load("train")


def test_missing_files_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.tsv is not a file"):
        table(tmp_path / "gone.tsv").load("train")
    with pytest.raises(ConfigError, match=r"must be files ending in .tsv, .csv, .jsonl, .json, .parquet, got .*x.xlsx"):
        table(tmp_path / "x.xlsx")
    with pytest.raises(ConfigError, match=r"data.text must be one column or a list of two"):
        table(tmp_path / "x.tsv", text=["a", "b", "c"])


@pytest.mark.parametrize("label", ["1.7", "true", "Infinity", "NaN", "1e300", "null", "[1]", "9223372036854775808"])
@pytest.mark.parametrize("regression", [False, True])
def test_labels_that_are_not_whole_numbers_are_refused(label: str, regression: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "a", "label": 1.0}}\n{{"text": "b", "label": {label}}}\n')
    if regression and label in ("1.7", "9223372036854775808"):
        assert table(path, regression=True).load("test").labels.tolist() == [1, pytest.approx(float(label))]
        return
    wanted = "a finite number, got" if regression else "whole numbers from 0"
    wanted = {"NaN": "row has no label", "null": "row has no label", "[1]": "is a list"}.get(label, wanted)
    with pytest.raises(DataError, match=wanted):
        table(path, regression=regression).load("test")


def test_whole_numbers_as_floats_or_texts_are_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "a", "label": label} for label in (1.0, "2", 3, -1)])
    assert table(path).load("test").labels.tolist() == [1, 2, 3, -1]
    write(path, [{"text": "a", "label": label} for label in (True, False)])
    assert table(path).load("test").labels.tolist() == [1, 0]


@pytest.mark.parametrize("prompt", [None, "It is {text}."])
def test_half_a_surrogate_pair_is_refused(prompt: str | None, tmp_path: Path) -> None:
    """Tokenizers would raise their own error."""
    path = write(tmp_path / "x.jsonl", [{"text": "a", "label": 1}, {"text": "b\ud800", "label": 1}])
    with pytest.raises(
        DataError, match=r"x.jsonl, row 2: the text holds '\\ud800', which is not a character"
    ) as raised:
        table(path, prompt=prompt).load("test")
    str(raised.value).encode()
    with pytest.raises(DataError, match=r"x.jsonl, row 2: the text holds"):
        Documents(str(path), str(path)).load("test")


@pytest.mark.parametrize("prompt", ["{text:Q}", "{text!x}", "{text:{label}}", "{text:{}}", "{text", "{}", "{a.b}"])
def test_invalid_prompts_are_refused(prompt: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.prompt must "):
        table(tmp_path / "x.jsonl", prompt=prompt)


def test_format_specs_in_prompts_apply_to_matching_values(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "a", "count": 3, "label": 1}])
    assert list(table(path, prompt="{text:>3}{count:03d}{count!r}").load("test").inputs) == ["  a0033"]
    with pytest.raises(
        DataError, match=r"x.jsonl, row 1: the values do not fit data.prompt '{text:d}' .*remove the format"
    ):
        table(path, prompt="{text:d}").load("test")
