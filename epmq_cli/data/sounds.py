"""Sounds from local files, with the texts that are spoken in them.

Wav files with whole numbers (PCM, 8 to 32 bits) are read by the standard library, all other files by the package
soundfile. Channels are averaged.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epmq_cli.data.folders import is_hidden
from epmq_cli.data.samples import Samples, Split
from epmq_cli.data.table import KINDS, Table
from epmq_cli.errors import DataError, first_line
from epmq_cli.runtime.paths import check_permitted, expanded

ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif")
"""Of the sounds of a folder without a table."""
WIDEST = 4  # bytes of a PCM value


@dataclass(frozen=True)
class Sound:
    """A sound: `values` (samples,) from -1 to 1, `rate` of them in a second. `where`: its file."""

    values: NDArray[np.float32]
    rate: int
    where: str


class SoundFiles(Sequence[Sound]):
    """Sounds that are read on access."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Sound]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Sound:  # type: ignore[override]
        return read_sound(self._paths[index])

    def raw(self, index: int) -> bytes:
        """The bytes of the file."""
        return self._paths[index].read_bytes()


def read_sound(path: Path) -> Sound:
    """The sound in a file; DataError if it cannot be read."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; paths in a table of sounds start from the table's folder")
    check_permitted(path, DataError)
    try:
        values, rate = _pcm(path)
    except (wave.Error, EOFError):
        values, rate = _by_soundfile(path)
    if not len(values) or rate < 1:
        raise DataError(f"{path} holds no sound; remove or replace it")
    if not np.isfinite(values).all():
        raise DataError(f"{path} holds values that are NaN or infinite; remove or replace it")
    return Sound(np.ascontiguousarray(values.mean(1, dtype=np.float32)), rate, str(path))


def _pcm(path: Path) -> tuple[NDArray[np.float32], int]:
    """The values (samples, channels) of a wav file of whole numbers, and their rate; wave.Error if it is no such
    file."""
    with wave.open(str(path), "rb") as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        content = np.frombuffer(file.readframes(file.getnframes()), dtype=np.uint8)
    if not 1 <= width <= WIDEST or not channels:
        raise wave.Error("unknown width")
    content = content[: len(content) // (width * channels) * width * channels].reshape(-1, width)
    if width == 1:  # the only width without a sign
        content = np.bitwise_xor(content, np.uint8(0x80))
    wide = np.zeros((len(content), WIDEST), dtype=np.uint8)
    wide[:, WIDEST - width :] = content
    values = wide.view("<i4")[:, 0] / np.float32(1 << 31)
    return values.reshape(-1, channels).astype(np.float32), rate


def _by_soundfile(path: Path) -> tuple[NDArray[np.float32], int]:
    if find_spec("soundfile") is None:
        raise DataError(
            f"{path} is not a wav file of whole numbers (PCM), which epmq reads itself; pip install soundfile for "
            "other formats, or convert it"
        )
    import soundfile

    try:
        values, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} is not a sound that soundfile can read ({first_line(error)}); remove or replace it"
        ) from error
    return values, int(rate)


@dataclass(frozen=True)
class SoundTable:
    """Tables `train` and `test` with one sound per row, or folders that contain such a table as metadata.csv or
    metadata.jsonl.

    `audio`: the column of the file, from the table's folder. `answer`: the column of the spoken text, which the train
    table need not have. A folder without a table suffices for `train`: all of its sounds.
    """

    train: str
    test: str
    audio: str = "audio"
    answer: str = "text"

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Sounds of the split, read on access."""
        place = self._place(split)
        if place.is_dir():
            return Samples(SoundFiles(_sounds(place))).some(count, seed)
        rows = self._table(place).load(split)
        files = SoundFiles([place.parent / name for name in rows.inputs])
        return Samples(files, references=rows.references).some(count, seed)

    def check_first(self, split: Split) -> int:
        """See CheckedSource. Reads the first sound."""
        place = self._place(split)
        if not place.is_dir():
            self._table(place).check_first(split)
        first = self.load("train" if place.is_dir() else split, 1)
        return len(list(first.inputs))

    def _table(self, path: Path) -> Table:
        return Table(str(path), str(path), text=self.audio, answer=self.answer)

    def _place(self, split: Split) -> Path:
        """The table of a split, or its folder if that has none."""
        path = expanded(self.train if split == "train" else self.test)
        if not path.is_dir():
            if path.suffix.lower() not in KINDS:
                raise DataError(
                    f"{path} must be a folder or a table ending in {', '.join(KINDS)}; relative data paths start from "
                    "the folder where epmq runs"
                )
            return path
        tables = [path / f"metadata{kind}" for kind in KINDS if (path / f"metadata{kind}").is_file()]
        if not tables and split == "test":
            raise DataError(
                f"{path} has no metadata.csv or metadata.jsonl with the columns {self.audio} and {self.answer}; write "
                "one, or set eval.stages=[] to merge and calibrate without scoring"
            )
        return tables[0] if tables else path


def _sounds(folder: Path) -> list[Path]:
    """The sounds of a folder, sorted by file name; DataError if it has none."""
    paths: list[Any] = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS]
    found = [path for path in paths if path.is_file() and not is_hidden(path.name)]
    if not found:
        raise DataError(f"{folder} has no sounds, which end in {', '.join(ENDINGS)}")
    return found
