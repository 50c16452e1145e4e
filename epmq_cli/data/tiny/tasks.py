"""The image tasks of the built-in suite `tiny`, drawn by code, so that nothing is downloaded."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from epmq_cli.config.validate import check_range
from epmq_cli.data.tiny.draw import COLUMNS, SIDE, Dice, Labels, paint
from epmq_cli.errors import ConfigError

if TYPE_CHECKING:
    from epmq_cli.data.samples import Samples, Split

CLASSES: dict[str, tuple[str, ...]] = {
    "shapes": ("circle", "square", "triangle", "cross", "ring", "diamond", "crescent", "hourglass"),
    "textures": (
        *("horizontal stripes", "vertical stripes", "falling stripes", "rising stripes"),
        *("checks", "dots", "circles", "waves"),
    ),
    "digits": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "arrows": ("right", "down right", "down", "down left", "left", "up left", "up", "up right"),
    "counts": ("one", "two", "three", "four", "five", "six"),
}
"""Maps each task to the names of its classes, in label order."""

_CHUNK = 64  # samples drawn at once: 64 pictures in float32 fit into the CPU cache
_NOISE_WORDS = SIDE * SIDE * 3 // 8
_NOISE = np.float32(0.05)  # largest change of a channel, where 1 is white


@dataclass(frozen=True)
class Tiny:
    """One task of the suite `tiny`: its first `train` and first `test` samples."""

    task: str
    train: int
    test: int

    def __post_init__(self) -> None:
        if self.task not in CLASSES:
            raise ConfigError(f"data.task must be one of {', '.join(CLASSES)}, got {self.task!r}")
        for split in ("train", "test"):
            check_range(f"data.{split}", getattr(self, split), 1, 1 << 20, integer=True)

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Samples of the split: 32 x 32 RGB pictures and their labels. Without a seed only `count` are drawn."""
        # Imported here, so that `images` works without torch.
        import torch
        from PIL import Image

        from epmq_cli.data.samples import Samples

        size = self.train if split == "train" else self.test
        number = size if seed is not None or count is None else min(count, size)
        pixels, labels = images(self.task, split, number)
        pictures = [Image.fromarray(each) for each in pixels]
        return Samples(pictures, torch.from_numpy(labels), CLASSES[self.task]).some(count, seed)


def images(task: str, split: str, count: int) -> tuple[npt.NDArray[np.uint8], Labels]:
    """The first `count` samples of a split: pictures (count, 32, 32, 3) uint8 and labels (count,) int64.

    The split "web", on which the base was trained, shows the subjects on a plain background; all other splits show them
    in the task's scene. Sample i depends on (task, split, i) alone, so a longer list begins with a shorter one.
    """
    pixels = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    labels = _labels(task, split, count)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        words = np.stack([_words(task, split, index, COLUMNS + _NOISE_WORDS) for index in range(start, stop)])
        dice = Dice((words[:, :COLUMNS] >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        picture = paint(task, dice, labels[start:stop], in_scene=split != "web")
        noise = words[:, COLUMNS:].astype("<u8").view(np.uint8).reshape(picture.shape)
        picture = picture + _NOISE * (noise.astype(np.float32) / np.float32(127.5) - 1)
        pixels[start:stop] = np.clip(picture * 255 + np.float32(0.5), 0, 255).astype(np.uint8)
    return pixels, labels


def _labels(task: str, split: str, count: int) -> Labels:
    """(count,): each run of n samples holds each of the n classes once, in random order."""
    classes = len(CLASSES[task])
    runs = [np.argsort(_words(task, f"{split} labels", run, classes)) for run in range(-(-count // classes))]
    return np.concatenate(runs)[:count].astype(np.int64)


def _words(task: str, stream: str, index: int, count: int) -> npt.NDArray[np.uint64]:
    """(count,) random 64-bit words of one sample. numpy guarantees that raw words never change between versions."""
    seed = np.random.SeedSequence([zlib.crc32(f"{task}/{stream}".encode()), index])
    return np.random.PCG64(seed).random_raw(count)
