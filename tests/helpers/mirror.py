"""A miniature mirror of the hub: data sets with the real layout, splits and columns, and few pictures or sentences.

Every picture has one colour, 10 x row + 5 in all channels, and its label is the row modulo the number of classes, so
a test can derive the row from the picture.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

ROWS = {"train": 12, "test": 8}
GROUP = 3  # rows per row group
SIDE = 6


@dataclass(frozen=True)
class Layout:
    """One data set: `folder` of its parquet files, `splits` as (its name, train or test), the mode of its pictures.

    `image` and `label`: their columns; `others`: further columns, as arrow types. `config`: the name that its README
    declares, "" for a data set without README. `shards`: files of the train split.
    """

    path: str
    classes: int
    folder: str = "data"
    splits: Sequence[tuple[str, str]] = (("train", "train"), ("test", "test"))
    mode: str = "RGB"
    image: str = "image"
    label: str = "label"
    label_type: str = "int64"
    others: Mapping[str, str] = field(default_factory=dict)
    config: str = "default"
    shards: int = 1


LAYOUTS: dict[str, Layout] = {
    "sun397": Layout("tanganke/sun397", 397, shards=2),
    "stanford-cars": Layout("tanganke/stanford_cars", 196, splits=(("train", "train"), ("test", "test"))),
    "resisc45": Layout("tanganke/resisc45", 45, config=""),
    "eurosat": Layout("tanganke/eurosat", 10, splits=(("train", "train"), ("test", "test"), ("contrast", "test"))),
    "svhn": Layout(
        "ufldl-stanford/svhn",
        10,
        "cropped_digits",
        (("train", "train"), ("test", "test"), ("extra", "test")),
        config="cropped_digits",
    ),
    "gtsrb": Layout("tanganke/gtsrb", 43),
    "mnist": Layout("ylecun/mnist", 10, "mnist", mode="L", config="mnist"),
    "dtd": Layout("tanganke/dtd", 47, config=""),
    "oxford_flowers102": Layout(
        "dpdl-benchmark/oxford_flowers102",
        102,
        splits=(("train", "train"), ("validation", "test"), ("test", "test")),
        others={"file_name": "string"},
    ),
    "pcam": Layout(
        "1aurent/PatchCamelyon", 2, splits=(("train", "train"), ("valid", "test"), ("test", "test")), label_type="bool"
    ),
    "fer2013": Layout("clip-benchmark/wds_fer2013", 7, mode="L", image="jpg", label="cls"),
    "oxford-iiit-pet": Layout(
        "timm/oxford-iiit-pet", 37, others={"image_id": "string", "label_cat_dog": "int64"}, mode="RGB"
    ),
    "stl10": Layout("tanganke/stl10", 10),
    "cifar100": Layout("tanganke/cifar100", 100, label="fine_label", others={"coarse_label": "int64"}),
    "cifar10": Layout("tanganke/cifar10", 10, "plain_text", config="plain_text"),
    "food101": Layout("ethz/food101", 101, splits=(("train", "train"), ("validation", "test"))),
    "fashion_mnist": Layout(
        "zalando-datasets/fashion_mnist", 10, "fashion_mnist", mode="L", config="fashion_mnist", others={}
    ),
    "emnist_letters": Layout("tanganke/emnist_letters", 26, "emnist-letters", mode="L", config="emnist-letters"),
    "kmnist": Layout("tanganke/kmnist", 10, "kmnist", mode="L", config="kmnist"),
    "rendered-sst2": Layout(
        "nateraw/rendered-sst2", 2, splits=(("train", "train"), ("validation", "test"), ("test", "test"))
    ),
}
"""Task -> its data set, including its peculiarities."""

TWO = {"sentence1": "string", "sentence2": "string"}
GLUE: dict[str, tuple[Mapping[str, str], str]] = {
    "cola": ({"sentence": "string"}, "validation"),
    "mnli": ({"premise": "string", "hypothesis": "string"}, "validation_matched"),
    "mrpc": (TWO, "validation"),
    "qnli": ({"question": "string", "sentence": "string"}, "validation"),
    "qqp": ({"question1": "string", "question2": "string"}, "validation"),
    "rte": (TWO, "validation"),
    "sst2": ({"sentence": "string"}, "validation"),
    "stsb": (TWO, "validation"),
}
"""Configuration of nyu-mll/glue -> its columns of text, and the split that is scored."""


def prepare(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Moves the cache of `datasets` to a folder of the test, and skips its wait of seconds after each draw."""
    import datasets

    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def image_mirror(folder: Path, tasks: Iterable[str] = tuple(LAYOUTS)) -> Path:
    """Writes the data sets of these CLIP tasks to `<folder>/datasets/<owner>/<name>`."""
    for task in tasks:
        layout = LAYOUTS[task]
        place = folder / "datasets" / layout.path
        place.mkdir(parents=True)
        for split, like in layout.splits:
            if task == "fer2013":
                _write_tar(place / split / "0.tar", layout, ROWS[like])
            else:
                write_images(place / layout.folder, split, layout, ROWS[like], layout.shards if like == "train" else 1)
        if task != "fer2013" and layout.config:
            _write_readme(place, {layout.config: {split: f"{layout.folder}/{split}-*" for split, _ in layout.splits}})
    return folder


def glue_mirror(folder: Path, tasks: Iterable[str] = tuple(GLUE)) -> Path:
    """Writes these configurations of GLUE to `<folder>/nyu-mll/glue`."""
    place, declared = folder / "nyu-mll" / "glue", {}
    for task in tasks:
        texts, scored = GLUE[task]
        types = {**texts, "label": "float32" if task == "stsb" else "int64", "idx": "int32"}
        for split, like in (("train", "train"), (scored, "test"), ("test", "test")):
            rows = [_glue_row(task, texts, row, split) for row in range(ROWS[like])]
            write_rows(place / task / f"{split}-00000-of-00001.parquet", rows, types)
        declared[task] = {split: f"{task}/{split}-*" for split in ("train", scored, "test")}
    _write_readme(place, declared)
    return folder


def _glue_row(task: str, texts: Mapping[str, str], row: int, split: str) -> dict[str, Any]:
    label: float = row % 5 + 0.25 if task == "stsb" else row % (3 if task == "mnli" else 2)
    words = {name: f"it is a {'good' if row % 2 else 'bad'} {name} {row}" for name in texts}
    return {**words, "label": -1 if split == "test" else label, "idx": row}


def write_images(folder: Path, split: str, layout: Layout, rows: int, shards: int = 1) -> None:
    """Writes the parquet files of a split with the names of the hub."""
    types = {layout.image: "image", layout.label: layout.label_type, **layout.others}
    for shard in range(shards):
        found = [_image_row(layout, row) for row in range(rows) if row * shards // rows == shard]
        write_rows(folder / f"{split}-{shard:05}-of-{shards:05}.parquet", found, types)


def _image_row(layout: Layout, row: int) -> dict[str, Any]:
    label = row % layout.classes
    others = {name: f"{row}.png" if kind == "string" else 0 for name, kind in layout.others.items()}
    value = bool(label) if layout.label_type == "bool" else label
    return {layout.image: {"bytes": _picture(layout.mode, row, "PNG"), "path": None}, layout.label: value, **others}


def _picture(mode: str, row: int, kind: str) -> bytes:
    shade = 10 * row + 5
    buffer = io.BytesIO()
    Image.new(mode, (SIDE, SIDE), shade if mode == "L" else (shade,) * 3).save(buffer, kind)
    return buffer.getvalue()


def write_rows(path: Path, rows: list[dict[str, Any]], types: Mapping[str, str]) -> None:
    """Writes a parquet file in small row groups, with the features that `datasets` stores in its schema."""
    stored = {name: _feature(kind) for name, kind in types.items()}
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    fields = [
        (name, image if kind == "image" else getattr(pyarrow, _ARROW.get(kind, kind))()) for name, kind in types.items()
    ]
    schema = pyarrow.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": stored}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=GROUP)


_ARROW = {"bool": "bool_"}


def _feature(kind: str) -> dict[str, str]:
    return {"_type": "Image"} if kind == "image" else {"dtype": kind, "_type": "Value"}


def _write_tar(path: Path, layout: Layout, rows: int) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as archive:
        for row in range(rows):
            label = str(row % layout.classes).encode()
            for name, content in (("jpg", _picture(layout.mode, row, "JPEG")), ("cls", label)):
                entry = tarfile.TarInfo(f"s{row:07}.{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def _write_readme(place: Path, configs: Mapping[str, Mapping[str, str]]) -> None:
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
    (place / "README.md").write_text("\n".join([*lines, "---", ""]))
