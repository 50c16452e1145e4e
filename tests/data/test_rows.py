"""Oracle: the rows that csv, json or the test itself wrote to the files."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from epmq_cli.data.columns import Columns, columns
from epmq_cli.data.documents import Documents
from epmq_cli.data.table import Table, read_rows
from epmq_cli.errors import DataError

ROWS = [{"text": "one", "label": "1"}, {"text": "fünf", "label": "0"}]
JSON = [json.dumps(row, ensure_ascii=False) for row in ROWS]
LINES = {
    "a.csv": "text,label\none,1\nfünf,0\n",
    "a.tsv": "text\tlabel\none\t1\nfünf\t0\n",
    "a.jsonl": "\n".join(JSON) + "\n",
}


def named(*names: str) -> Columns:
    return columns("text", names, None, None, None, False)


def read(path: Path, content: str | bytes) -> list[dict[str, Any]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(path, named("text", "label"))


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_and_line_ends_are_not_part_of_the_rows(
    name: str, ending: str, mark: str, tmp_path: Path
) -> None:
    assert read(tmp_path / name, mark + LINES[name].replace("\n", ending)) == ROWS
    assert read(tmp_path / name.upper(), mark + LINES[name]) == ROWS
    text = f"{mark}one\nfünf".replace("\n", ending)
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert list(Documents(str(tmp_path / "a.txt"), "b.txt").load("train").inputs) == ["one\nfünf"]


@pytest.mark.parametrize("name", [*LINES, "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_other_encodings_and_nul_bytes_are_named(name: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(LINES.get(name, "one").encode(encoding))
    message = "it is in UTF-16; save it in UTF-8" if encoding == "utf-16" else "line 1 holds a NUL byte"
    with pytest.raises(DataError, match=f"a.* cannot be read as .* in UTF-8 \\({message}"):
        Documents(str(path), str(path)).load("train")
    path.write_bytes(LINES.get(name, "one\nfünf").replace("fünf", "f\0nf").encode())
    with pytest.raises(DataError, match=r"line [23] holds a NUL byte"):
        Documents(str(path), str(path)).load("train")


def test_nul_characters_in_json_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b"}\n')
    with pytest.raises(DataError, match=r"a.jsonl, row 1: the text holds a NUL character"):
        Documents(str(tmp_path / "a.jsonl"), "b.txt").load("train")


@pytest.mark.parametrize(
    "text",
    [
        "\n\n".join(JSON),
        ",\n".join(JSON) + ",",
        f"[{','.join(JSON)}]",
        json.dumps(ROWS, indent=2),
        f"[{JSON[0]}]\n[{JSON[1]}]\n",
        f"\ufeff{JSON[0]}\n\ufeff{JSON[1]}\n",
        "".join(JSON),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_may_be_lines_or_an_array(text: str, name: str, tmp_path: Path) -> None:
    assert read(tmp_path / name, text) == ROWS


@pytest.mark.parametrize("text", ["[1, 2]", "3", '"one"', "[[{}]]", '{"text": "a"', "{'text': 'a'}"])
def test_json_other_than_a_list_of_objects_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a.json cannot be read as json in UTF-8"):
        read(tmp_path / "a.json", text)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_a_duplicate_column_is_refused_when_it_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        columns = [pyarrow.array(["one", "two"])] * 2 + [pyarrow.array([0, 1])]
        pyarrow.parquet.write_table(pyarrow.table(columns, names=["text", "text", "label"]), path)
    else:
        tab = "\t" if name == "a.tsv" else ","
        lines = {"a.jsonl": ['{"text": "one", "text": "two", "label": 0}']}.get(name, ["text,text,label", "one,two,0"])
        path.write_text("\n".join(line if name == "a.jsonl" else line.replace(",", tab) for line in lines))
    with pytest.raises(DataError, match=r"row 1 has the column text twice; rename one of them"):
        read_rows(path, named("text", "label"))
    assert int(read_rows(path, named("label"))[0]["label"]) == 0


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_rows_with_more_fields_than_the_header_are_refused(name: str, tmp_path: Path) -> None:
    tab = "\t" if name == "a.tsv" else ","
    with pytest.raises(DataError, match=r"row 2 has 3 fields, but the header has 2 columns"):
        read(tmp_path / name, "text,label\none,1\ntwo,and more,0\n".replace(",", tab))


AWKWARD = ["plain", 'say "no"', '"all of it"', "a\ttab", "two\nlines", 'a ""doubled"" one', '"', "", "comma, too"]
NEEDS = {
    "pandas": csv.QUOTE_MINIMAL,
    "pandas, all": csv.QUOTE_ALL,
    "R": csv.QUOTE_NONNUMERIC,
}


@pytest.mark.parametrize("writer", NEEDS)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_quotes_written_by_programs_are_syntax(
    writer: str, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = io.StringIO(newline="")
    made = csv.writer(file, delimiter="\t", quoting=NEEDS[writer], lineterminator=ending)
    made.writerows([["text", "label"], *([text, 1.0] for text in AWKWARD)])
    with caplog.at_level(logging.INFO, "epmq"):
        assert [row["text"] for row in read(tmp_path / "a.tsv", file.getvalue())] == AWKWARD
    assert "the quotes around fields are read as syntax" in caplog.text


@pytest.mark.parametrize(
    "texts",
    [
        ['"Hello there', "plain"],
        ['"Hello there', 'and "there"'],
        ["plain", 'he said "no"'],
        ['"so" he said', '"never"'],
        ['"one', 'two"'],  # with quotes as syntax, this would be one valid row
    ],
)
def test_quotes_in_files_like_those_of_glue_are_text(texts: list[str], tmp_path: Path) -> None:
    content = "text\tlabel\n" + "".join(f"{text}\t1\n" for text in texts)
    assert [row["text"] for row in read(tmp_path / "a.tsv", content)] == texts


@pytest.mark.parametrize("text", ['"A fine film."', '"so \\"fine\\" a film"'])
def test_ambiguous_quotes_are_text_with_a_warning(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "epmq"):
        (row,) = read(tmp_path / "a.tsv", f"text\tlabel\n{text}\t1\n")
    assert row["text"] == text
    (message,) = caplog.messages
    assert message.endswith("are read as part of the text; if they are not, save the file as csv or jsonl")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, r"a number \(3\), not text; choose the column that holds the text, or set data.prompt to '{text}'"),
        (0.5, r"a number \(0.5\), not text"),
        (True, r"a truth value \(true\), not text"),
        (float("nan"), r"no value \(NaN\), not text"),
        (["a", "b"], r"a list \(\['a', 'b'\]\), not text; a list must be a conversation"),
        ([], r"a list \(\[\]\), not text"),
        ({"en": "a", "de": "b"}, "an object with the keys en, de, not text"),
    ],
)
def test_values_that_are_not_text_are_refused(value: Any, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one", "label": 1}, {"text": value, "label": 0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (Table(str(path), str(path)), Documents(str(path), str(path))):
        with pytest.raises(DataError, match=f"a.jsonl, row 2: column text holds {kind}"):
            source.load("train")
    with pytest.raises(DataError, match=r"row 2: column text holds (an?|no) .*, not text"):
        Table(str(path), str(path), text=["text", "text"]).load("train")


def test_bytes_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"one"], "label": [1]}), path)
    with pytest.raises(DataError, match=r"column text holds bytes \(b'one'\), not text; .*, or store it as strings"):
        Table(str(path), str(path)).load("train")


def test_numbers_in_prompts_keep_their_stored_digits(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for kind in (pyarrow.float32(), pyarrow.float64()):
        scores = pyarrow.array([3.8, 0.1, 2.0, 1e-9], kind)
        pyarrow.parquet.write_table(pyarrow.table({"score": scores, "label": [0] * 4}), path)
        samples = Table(str(path), str(path), prompt="{score}").load("train")
        assert list(samples.inputs) == ["3.8", "0.1", "2.0", "1e-09"]


def test_texts_that_look_like_json_are_texts(tmp_path: Path) -> None:
    texts = ["[{", '[{"a": 1}]', "[1]", '{"role": "user", "content": "a"}']
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert list(Documents(str(tmp_path / "a.jsonl"), "b.txt").load("train").inputs) == texts


def test_prompts_accept_only_texts_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "score": 3, "label": 1}\n{"text": "two", "score": 0.5, "label": 1}\n')
    for source in (Table, Documents):
        made = source(str(path), str(path), prompt="{text} is {score}")
        assert list(made.load("train").inputs) == ["one is 3", "two is 0.5"]
    for value, kind in (("[1]", "a list"), ("true", "a truth value"), ("NaN", "no value"), ("{}", "an object")):
        path.write_text(f'{{"text": "one", "score": {value}, "label": 1}}\n')
        with pytest.raises(DataError, match=rf"row 1: column score holds {kind} .*data.prompt takes texts and numbers"):
            Table(str(path), str(path), prompt="{text} is {score}").load("train")
