"""Copies of the miniature hubs with changed tensors of a model, or changed arrays or rows of its data."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import TASKS

MODELS = ("base", *TASKS)


def copied(hub: Path, folder: Path) -> Path:
    """A copy of a hub whose suite refers to its own files."""
    shutil.copytree(hub, folder)
    suite = folder / "configs" / "suite" / "mini.yaml"
    suite.write_text(suite.read_text().replace(str(hub), str(folder)))
    return folder


def edit_tensors(model: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the tensors of a model folder."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def put(model: Path, part: str, value: float) -> None:
    """Sets one item of the only tensor whose name contains `part`."""

    def change(tensors: dict[str, Tensor]) -> None:
        (name,) = (name for name in tensors if part in name)
        tensors[name].view(-1)[0] = value

    edit_tensors(model, change)


def scale(hub: Path, part: str, factor: float) -> None:
    """Multiplies all tensors whose names contain `part`, in base and experts."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if part in name:
                tensor.mul_(factor)

    for model in MODELS:
        edit_tensors(hub / model, change)


def edit_pictures(hub: Path, change: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]) -> None:
    """Replaces the training pictures of both tasks. `change` maps images and labels to new ones."""
    for task in TASKS:
        arrays = dict(np.load(hub / f"{task}.npz"))
        own = change({name: arrays[f"train_{name}"] for name in ("images", "labels")})
        np.savez(hub / f"{task}.npz", **(arrays | {f"train_{name}": array for name, array in own.items()}))


def write_rows(hub: Path, rows: str) -> None:
    """Writes these training rows for both tasks."""
    for task in TASKS:
        (hub / f"{task}_train.tsv").write_text(f"label\ttext\n{rows}")


def all_finite(checkpoint: Path) -> bool:
    """Whether all numbers in a checkpoint's files are finite."""
    tensors = [tensor for path in checkpoint.glob("*.safetensors") for tensor in load_file(path).values()]
    return len(tensors) > 0 and all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
