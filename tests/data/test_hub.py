"""Oracle: a data set folder in the hub's layout, written by pyarrow and read through `datasets`, offline."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from epmq_cli.data.hub import Hub
from epmq_cli.errors import DataError

pytest.importorskip("datasets", reason="needs the extra hub")


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, count in (("train", 4), ("validation", 2)):
        columns = {
            "a": [f"a{i}" for i in range(count)],
            "b": [f"b{i}" for i in range(count)],
            "y": [i % 2 for i in range(count)],
        }
        pyarrow.parquet.write_table(
            pyarrow.table(columns), tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        )
    return tmp_path / "set"


def test_columns_and_splits_are_read(local: Path) -> None:
    source = Hub(path=str(local), test="validation", input="a", label="y")
    assert list(source.load("train").inputs) == ["a0", "a1", "a2", "a3"]
    assert source.load("test").labels.tolist() == [0, 1]


def test_pairs_are_read(local: Path) -> None:
    source = Hub(path=str(local), test="validation", input=["a", "b"], label="y")
    assert list(source.load("test").inputs) == [("a0", "b0"), ("a1", "b1")]


def test_missing_columns_splits_and_sets_are_named(local: Path) -> None:
    with pytest.raises(DataError, match="has no column image; its columns are a, b, y"):
        Hub(path=str(local), label="y").load("train")
    with pytest.raises(DataError, match="cannot be had; check its id, name and split"):
        Hub(path=str(local), input="a", label="y", test="nope").load("test")
    with pytest.raises(DataError, match="cannot be had"):
        Hub(path="someone/nothing", input="a", label="y").load("test")
