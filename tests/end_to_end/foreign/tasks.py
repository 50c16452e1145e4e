"""The axis "sources": the data of a task in the formats of users, labelled with the expert's predictions in
transformers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import WORDS
from tests.end_to_end.foreign.kinds import CLASSES, quiet

ROWS = 24
Row = tuple[str, str]
MARGIN = 0.02  # of logits; closer samples are skipped, because sums depend on the number of threads


def texts(seed: int, capitals: bool) -> list[str]:
    """Random sentences. With `capitals`, every third word has a capital letter."""
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(WORDS, generator.integers(2, 9)) for _ in range(3 * ROWS)]
    return [" ".join(w.capitalize() if capitals and i % 3 == 0 else w for i, w in enumerate(words)) for words in drawn]


def pictures(seed: int) -> list[Image.Image]:
    """Random pictures of various brightness."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, 256, (3 * ROWS, 16, 16, 3)) * generator.random((3 * ROWS, 1, 1, 3))
    return [Image.fromarray(array.astype(np.uint8)) for array in drawn]


@torch.inference_mode()
def balance_predictions(expert: Any, batch: dict[str, Tensor]) -> None:
    """Changes the last linear of an expert so that its predictions on a batch are clear and cover all classes."""
    linear = next(module for module in reversed(list(expert.modules())) if isinstance(module, torch.nn.Linear))
    linear.weight.mul_(30)
    linear.bias.zero_()
    with quiet():
        logits = expert(**batch).logits
    linear.bias.sub_(logits.median(0).values)


@torch.inference_mode()
def clear(logits: Tensor, count: int = ROWS) -> tuple[list[int], list[int]]:
    """The first rows with a clear prediction, and their classes; every class occurs."""
    top = logits.topk(2, -1).values
    sure = torch.nonzero(top[:, 0] - top[:, 1] > MARGIN).flatten()[:count].tolist()
    classes = logits.argmax(-1)[sure].tolist()
    assert len(set(classes)) == CLASSES, sorted(classes)
    return sure, classes


def _delimited(bom: bool, **options: Any) -> Callable[[Path, Sequence[Row]], None]:
    def write(path: Path, rows: Sequence[Row]) -> None:
        with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
            writer = csv.writer(file, **options)
            writer.writerow(["text", "label"])
            writer.writerows(rows)

    return write


def _lines(bom: bool) -> Callable[[Path, Sequence[Row]], None]:
    def write(path: Path, rows: Sequence[Row]) -> None:
        lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        path.write_text(lines, encoding="utf-8-sig" if bom else "utf-8")

    return write


def _parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"text": [row[0] for row in rows], "label": [row[1] for row in rows]}), path
    )


SOURCES: dict[str, tuple[str, Callable[[Path, Sequence[Row]], None]]] = {
    "csv": ("csv", _delimited(bom=False)),
    "csv-bom": ("csv", _delimited(bom=True)),
    "csv-quoted": ("csv", _delimited(bom=False, quoting=csv.QUOTE_ALL)),
    "tsv": ("tsv", _delimited(bom=False, delimiter="\t")),
    "tsv-bom": ("tsv", _delimited(bom=True, delimiter="\t")),
    "tsv-quoted": ("tsv", _delimited(bom=False, delimiter="\t", quoting=csv.QUOTE_ALL)),
    "jsonl": ("jsonl", _lines(bom=False)),
    "jsonl-bom": ("jsonl", _lines(bom=True)),
    "parquet": ("parquet", _parquet),
}
"""By name: the file's extension, and the function that writes it."""


def write_table(place: Path, source: str, rows: Sequence[Row], listed: Sequence[str] | None) -> dict[str, Any]:
    """Writes a table of texts and labels; returns its suite entry."""
    ending, write = SOURCES[source]
    path = place / f"data.{ending}"
    write(path, rows)
    entry: dict[str, Any] = {"_target_": "epmq_cli.data.table.Table", "train": str(path), "test": str(path)}
    return entry | ({"labels": list(listed)} if listed else {})


def write_classes(place: Path, images: Sequence[Image.Image], names: Sequence[str]) -> dict[str, Any]:
    """Writes pictures into folders named after their classes; returns their suite entry."""
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        (place / "pictures" / name).mkdir(parents=True, exist_ok=True)
        image.save(place / "pictures" / name / f"{index:03}.png")
    folder = str(place / "pictures")
    return {"_target_": "epmq_cli.data.images.ImageFolder", "train": folder, "test": folder}
