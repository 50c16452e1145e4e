"""Oracles: label columns written by hand; counted class shares."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epmq_cli.data.hub import Hub
from epmq_cli.data.images import ImageFolder, Npz
from epmq_cli.data.labels import read_labels
from epmq_cli.data.samples import Samples
from epmq_cli.data.table import Table
from epmq_cli.errors import DataError


def read(values: list[Any], labels: Any = None, names: Any = None, regression: bool = False) -> tuple[list[Any], Any]:
    found, classes = read_labels(values, labels, names, regression, "x.csv")
    return found.tolist(), classes


@pytest.mark.parametrize(
    ("values", "labels", "names", "wanted"),
    [
        (["1", "0", "1.0", 1.0, 1], None, None, ([1, 0, 1, 1, 1], None)),
        (["b", "a"], ["a", "b"], None, ([1, 0], ("a", "b"))),
        ([5, "4", 5.0], [4, 5], None, ([1, 0, 1], ("4", "5"))),
        (["no", "yes"], [False, True], None, ([0, 1], ("no", "yes"))),
        (["Off", "On"], [True, False], None, ([1, 0], ("On", "Off"))),
        ([True, False], [False, True], None, ([1, 0], ("False", "True"))),
        ([0, 1], None, ["neg", "pos"], ([0, 1], ("neg", "pos"))),
        ([0, 1, -1], ["pos", "neg"], ["neg", "pos"], ([1, 0, -1], ("pos", "neg"))),
        ([0, 1], ["1", "0"], ["neg", "pos"], ([1, 0], ("1", "0"))),
        ([0, 1], [False, True], ["no", "yes"], ([0, 1], ("no", "yes"))),
    ],
)
def test_labels_and_their_names(values: Any, labels: Any, names: Any, wanted: Any) -> None:
    assert read(values, labels, names) == wanted


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([0, [1, 0]], {}, r"row 2: the label \[1, 0\] is a list; .* multi-label .*eval.stages=\[\]"),
        ([0, None, float("nan"), " "], {}, "row 2: the row has no label .3 of 4 rows have none."),
        (["maybe", "no"], {"labels": [False, True]}, "label 'maybe' is not among data.labels.*so quote them"),
        (["1.5"], {}, "labels must be whole numbers from 0, got '1.5'; .*data.regression: true and metric: spearman"),
        ([2], {"names": ["neg", "pos"]}, "the labels are 2..2, but 2 classes have names"),
    ],
)
def test_invalid_labels_are_refused_by_name(values: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(values, **options)


def table(path: Path, rows: list[dict[str, Any]], **fields: Any) -> Table:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Table(str(path), str(path), **fields)


def test_calibration_data_need_no_labels(tmp_path: Path) -> None:
    """The inputs are those of the file for any label; test samples are refused."""
    texts = ["red film", "blue film"]
    for label in ({}, {"label": None}, {"label": [0, 1]}, {"label": "spam"}):
        source = table(tmp_path / "x.jsonl", [{"text": text, **label} for text in texts])
        assert list(source.load("train").inputs) == texts
        with pytest.raises(DataError, match="label"):
            source.load("test")
    source = table(tmp_path / "x.jsonl", [{"text": text} for text in texts], label=None)
    assert (source.load("test").labels, list(source.load("test").inputs)) == (None, texts)


def test_calibration_pictures_need_no_labels(tmp_path: Path) -> None:
    """A flat folder and an npz without labels give their pictures; test samples are refused."""
    for index in range(3):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / f"{index}.png")
    folder = ImageFolder(str(tmp_path), str(tmp_path))
    assert [image.getpixel((0, 0))[0] for image in folder.load("train").inputs] == [0, 1, 2]
    with pytest.raises(DataError, match="one sub-folder"):
        folder.load("test")
    pictures = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "x.npz", train_images=pictures, test_images=pictures)
    npz = Npz(str(tmp_path / "x.npz"))
    assert (len(npz.load("train")), npz.load("train").labels) == (2, None)
    with pytest.raises(DataError, match="test_labels"):
        npz.load("test")


def hub(tmp_path: Path, names: list[str], **splits: list[int]) -> str:
    """A data set with ClassLabels and a split per list of labels; its texts encode their row."""
    datasets = pytest.importorskip("datasets", reason="needs the extra hub")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    for split, labels in splits.items():
        rows = {"text": [f"row {i}" for i in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    return str(tmp_path / "set")


@pytest.mark.slow
def test_class_labels_have_names_and_unlabelled_rows_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The names come from the file; a label of -1 marks an unlabelled sample."""
    path = hub(tmp_path, ["neg", "pos"], train=[0, 1], validation=[0, 1, -1, 1], test=[-1, -1])
    source = Hub(path, input="text", test="validation")
    for samples in (source.load("test"), source.load("test", 10, 0)):
        assert (samples.labels.tolist(), samples.classes) == ([0, 1, 1], ("neg", "pos"))
    assert "1 of 4 samples of the split validation have no label (-1) and are skipped" in caplog.text
    assert Hub(path, input="text").load("test").labels.tolist() == [-1, -1]
    turned = Hub(path, input="text", test="validation", labels=["pos", "neg"]).load("test")
    assert (turned.labels.tolist(), turned.classes) == ([1, 0, 0], ("pos", "neg"))


@pytest.mark.slow
def test_a_streamed_draw_keeps_the_share_of_each_class(tmp_path: Path) -> None:
    """A split sorted by label: 90 of one class, 30 of the other."""
    source = Hub(hub(tmp_path, ["a", "b"], train=[0], test=[0] * 90 + [1] * 30), input="text")
    samples = source.load("test", 40, seed=3)
    assert Counter(samples.labels.tolist()) == {0: 30, 1: 10}
    assert list(samples.inputs) == list(source.load("test", 40, seed=3).inputs)


@pytest.mark.parametrize("count", [1, 7, 24, 60, 119])
def test_shares_of_classes_are_exact_to_within_a_sample(count: int) -> None:
    """Closed form: count x share, for any order of the file."""
    labels = torch.tensor([2] * 80 + [0] * 30 + [1] * 10)
    found = Samples(list(range(120)), labels).stratified(count, 5)
    assert list(found.inputs) == sorted(found.inputs)
    assert len(set(found.inputs)) == count
    for label, size in ((2, 80), (0, 30), (1, 10)):
        assert abs(found.labels.tolist().count(label) - count * size / 120) <= 1


def test_draws_depend_on_the_seed_and_longer_draws_contain_shorter_ones() -> None:
    """Also for numbers and for unlabelled samples."""
    for labels in (torch.arange(50) % 7, torch.arange(50) / 2, None):
        samples = Samples(list(range(50)), labels)
        draws = {seed: tuple(samples.stratified(10, seed).inputs) for seed in range(4)}
        assert len(set(draws.values())) == 4
        assert set(draws[0]) < set(samples.stratified(20, 0).inputs)
        assert list(samples.stratified(None, 0).inputs) == list(samples.stratified(99, 0).inputs) == list(range(50))


@pytest.mark.parametrize(
    ("values", "labels", "wanted"),
    [
        (["0.0", "1.0", "0.0"], [0, 1], [0, 1, 0]),
        ([" Pos", "neg ", "POS"], ["neg", "pos"], [1, 0, 1]),
        ([True, False], ["false", "true"], [1, 0]),
        (["True", "False"], ["false", "true"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["1.0", "2.0"], ["2.0", "1.0"], [1, 0]),
    ],
)
def test_values_match_labels_up_to_case_spaces_and_decimals(
    values: list[Any], labels: list[Any], wanted: list[int]
) -> None:
    """Labels that differ only in these are compared exactly."""
    assert read(values, labels)[0] == wanted


def test_values_that_match_no_label_are_named() -> None:
    with pytest.raises(DataError, match="label 'A ' is not among data.labels, which are A, a"):
        read(["A "], ["A", "a"])
    with pytest.raises(DataError, match="label '1.5' is not among data.labels"):
        read(["1.5"], [1, 2])
    with pytest.raises(DataError, match="row 1: the label {a: 1} is an object; epmq scores"):
        read([{"a": 1}])
