"""Image tasks from local files: folders of images, or npz arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from epmq_cli.data.samples import Samples, Split
from epmq_cli.errors import DataError
from epmq_cli.places import check_permitted, expanded

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class ImageFiles(Sequence[Image.Image]):
    """Images that are opened when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        path = self._paths[index]
        check_permitted(path, DataError)
        try:
            with Image.open(path) as image:
                image.load()
                return image.copy()
        except Exception as error:  # Pillow has no common one, and images come from anywhere
            raise DataError(f"{path} is not an image that Pillow can read ({error}); remove or replace it") from error

    def raw(self, index: int) -> bytes:
        """The file."""
        return self._paths[index].read_bytes()


@dataclass(frozen=True)
class ImageFolder:
    """Folders `train` and `test` with one sub-folder of images a class; images of `train`, whose labels are not used,
    may lie in the folder itself.

    `labels`: the names of the sub-folders in the order of the classes; null for their sorted names.
    """

    train: str
    test: str
    labels: Sequence[str] | None = None

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Images of the split, without a seed by class, then by file name."""
        folder = expanded(self.train if split == "train" else self.test)
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; data paths are taken from the folder that epmq was started in")
        found = sorted(path.name for path in folder.iterdir() if path.is_dir())
        flat = [] if found else sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if split == "train" and flat:  # calibration needs no labels
            return Samples(ImageFiles(flat)).some(count, seed)
        names = found if self.labels is None else [str(label) for label in self.labels]
        if not found or set(found) - set(names):
            raise DataError(
                f"{folder} must have one sub-folder for each of {', '.join(names) or 'the classes'}, "
                f"it has {', '.join(found) or 'none'}"
            )
        files = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((folder / name).glob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        return Samples(ImageFiles([path for path, _ in files]), labels).some(count, seed)


class ArrayImages(Sequence[Image.Image]):
    """Images of an array uint8 (n, height, width) or (n, height, width, 3), each made when it is asked for."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, position: int) -> Image.Image:  # type: ignore[override]
        return Image.fromarray(self._array[position])

    def raw(self, position: int) -> NDArray[np.uint8]:
        """The pixels."""
        pixels: NDArray[np.uint8] = self._array[position]
        return pixels


@dataclass(frozen=True)
class Npz:
    """One npz file with arrays train_images, test_images and test_labels; train_labels are not used.

    Images: uint8, (n, height, width) grey or (n, height, width, 3) RGB. Labels: whole numbers (n,).
    """

    path: str

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Images of the split."""
        path = expanded(self.path)
        check_permitted(path, DataError)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                images = arrays[f"{split}_images"]
                known = split == "test" or f"{split}_labels" in arrays  # calibration needs no labels
                labels = arrays[f"{split}_labels"] if known else None
        except Exception as error:  # numpy has no common one; pickled objects are never loaded
            raise DataError(
                f"{path} cannot be read as npz with arrays {split}_images and {split}_labels ({error})"
            ) from error
        grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
        pictures = images.dtype == np.uint8 and grey_or_rgb and 0 not in images.shape[1:]
        usable = labels is not None and labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
        if not pictures or (split == "test" and not usable):
            found = "none" if labels is None else f"{labels.dtype} {labels.shape}"
            raise DataError(
                f"{path}: {split}_images must be uint8 (n, height, width) or (n, height, width, 3) with n labels, "
                f"whole numbers, got {images.dtype} {images.shape} and labels {found}"
            )
        targets = torch.from_numpy(np.asarray(labels, dtype=np.int64)) if usable else None
        chosen = Samples(range(len(images)), targets).some(count, seed)
        return Samples(ArrayImages(images[list(chosen.inputs)]), chosen.labels)
