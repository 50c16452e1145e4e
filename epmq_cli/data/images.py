"""Image tasks from local files: folders of images, or npz arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from epmq_cli.data.folders import class_files, flat_images
from epmq_cli.data.pictures import Decoder, check_decoding
from epmq_cli.data.samples import Samples, Split
from epmq_cli.errors import ConfigError, DataError, literal
from epmq_cli.runtime.paths import check_permitted, expanded

FLAT = ""
"""The name of no class."""


class ImageFiles(Sequence[Image.Image]):
    """Images that are opened on access."""

    def __init__(self, paths: Sequence[Path], decoder: Decoder | None = None) -> None:
        self._paths, self._decoder = paths, decoder or Decoder()

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        path = self._paths[index]
        check_permitted(path, DataError)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}); remove or replace it") from error
        return self._decoder.decode(content, str(path))

    def raw(self, index: int) -> bytes:
        """The bytes of the file with the decoder's key."""
        return self._decoder.key + self._paths[index].read_bytes()


@dataclass(frozen=True)
class ImageFolder:
    """Folders `train` and `test` with one sub-folder of images per class. The images of `train`, whose labels are not
    used, may be in the folder itself.

    `labels`: the names of the sub-folders in the order of the classes; null for the sorted names of both splits.
    `background` and `white_level`: see `Decoder`.
    """

    train: str
    test: str
    labels: Sequence[str | int] | None = None
    background: str | None = "white"
    white_level: float | None = None

    def __post_init__(self) -> None:
        check_decoding(self.background, self.white_level)
        names = [str(label) for label in self.labels or ()]
        if len(set(names)) < len(names):
            raise ConfigError(f"data.labels must be different names of sub-folders, got {literal(names)}")

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Images of the split; without a seed they are sorted by class and file name."""
        listing = self._listing(split)
        files = [(path, label) for label, paths in enumerate(listing.values()) for path in paths]
        inputs = ImageFiles([path for path, _ in files], Decoder(self.background, self.white_level))
        if FLAT in listing:
            return Samples(inputs).some(count, seed)
        labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        return Samples(inputs, labels, tuple(listing)).some(count, seed)

    def check_first(self, split: Split) -> int:
        """See CheckedSource. Decodes an image of each class."""
        first = [paths[0] for paths in self._listing(split).values() if paths]
        return len(list(ImageFiles(first, Decoder(self.background, self.white_level))))

    def _listing(self, split: Split) -> dict[str, list[Path]]:
        """The images of each class; under `FLAT` those of a train folder without classes."""
        folder, other = map(expanded, (self.train, self.test) if split == "train" else (self.test, self.train))
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; relative data paths start from the folder where epmq runs")
        flat = flat_images(folder) if split == "train" else []  # calibration needs no labels
        return {FLAT: flat} if flat else class_files(folder, self.labels, other)


class ArrayImages(Sequence[Image.Image]):
    """Images of a uint8 array (n, height, width) or (n, height, width, 3), converted on access."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, position: int) -> Image.Image:  # type: ignore[override]
        return Image.fromarray(self._array[position]).convert("RGB")

    def raw(self, position: int) -> NDArray[np.uint8]:
        """The pixels."""
        pixels: NDArray[np.uint8] = self._array[position]
        return pixels


WHOLE = 1 << 24
"""Bytes of an npz file that a check reads."""


def _are_whole(labels: NDArray[Any]) -> bool:
    """Whether labels are whole numbers, of any type."""
    if labels.dtype.kind != "f":
        return labels.dtype.kind in "iub"
    return bool((np.isfinite(labels) & (labels == np.rint(labels))).all())


@dataclass(frozen=True)
class Npz:
    """An npz file with arrays train_images, test_images and test_labels; train_labels is not used.

    Images: uint8, (n, height, width) or (n, height, width, 1) grey, or (n, height, width, 3) RGB. Labels: whole numbers
    (n,) or (n, 1).
    """

    path: str

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Images of the split."""
        images, labels = self._arrays(split)
        targets = None if labels is None else torch.from_numpy(labels)
        chosen = Samples(range(len(images)), targets).some(count, seed)
        return Samples(ArrayImages(images[list(chosen.inputs)]), chosen.labels)

    def check_first(self, split: Split) -> int:
        """See CheckedSource. Reads a small file, and of a larger one nothing."""
        path = expanded(self.path)
        if path.is_file() and path.stat().st_size > WHOLE:
            return 1
        return len(self._arrays(split)[0])

    def _arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
        """The images of the split, and their labels if it has any."""
        path = expanded(self.path)
        check_permitted(path, DataError)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                images = arrays[f"{split}_images"]
                labelled = split == "test" or f"{split}_labels" in arrays  # calibration needs no labels
                labels = arrays[f"{split}_labels"] if labelled else None
        except Exception as error:  # numpy raises unrelated errors; pickled objects are never loaded
            raise DataError(
                f"{path} cannot be read as npz with arrays {split}_images and {split}_labels ({error})"
            ) from error
        images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
        labels = labels[:, 0] if labels is not None and labels.ndim == 2 and labels.shape[1] == 1 else labels
        grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
        pictures = images.dtype == np.uint8 and grey_or_rgb and 0 not in images.shape[1:]
        usable = labels is not None and labels.shape == images.shape[:1] and _are_whole(labels)
        if not pictures or (split == "test" and not usable):
            shape = "none" if labels is None else f"{labels.dtype} {labels.shape}"
            raise DataError(
                f"{path}: {split}_images must be uint8 (n, height, width), (n, height, width, 1) or (n, height, "
                f"width, 3) with n labels, whole numbers, got {images.dtype} {images.shape} and labels {shape}"
            )
        return images, np.asarray(labels, dtype=np.int64) if usable else None
