"""Oracles: the values that were written, and the rules of the data page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from epmq_cli.data import sounds
from epmq_cli.data.sounds import SoundTable, read_sound
from epmq_cli.errors import DataError
from tests.helpers.spoken import write_wav

VALUES = np.array([[0.5, -0.25], [-1.0, 1.0], [0.0, 0.125]])


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width_are_read(width: int, tmp_path: Path) -> None:
    sound = read_sound(write_wav(tmp_path / "x.wav", VALUES, 8000, width))
    assert (sound.rate, sound.values.dtype) == (8000, np.float32)
    np.testing.assert_allclose(sound.values, VALUES.mean(1), atol=2.0 ** (1 - 8 * min(width, 3)))


def test_other_files_need_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.flac"
    path.write_bytes(b"fLaC" + bytes(64))
    monkeypatch.setattr(sounds, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"x.flac is not a wav file of whole numbers .*; pip install soundfile for other"
    ):
        read_sound(path)


def test_a_file_without_sound_is_refused(tmp_path: Path) -> None:
    write_wav(tmp_path / "x.wav", np.zeros((0, 1)))
    with pytest.raises(DataError, match="x.wav holds no sound"):
        read_sound(tmp_path / "x.wav")
    with pytest.raises(DataError, match="y.wav is not a file; paths in a table of sounds start from"):
        read_sound(tmp_path / "y.wav")


def spoken(folder: Path, table: str = "metadata.csv") -> Path:
    """A folder with three sounds and a table of two."""
    folder.mkdir()
    for number in range(3):
        write_wav(folder / f"{number}.wav", np.full((4, 1), number / 4), 8000)
    (folder / ".hidden.wav").write_bytes(b"")
    (folder / table).write_text("audio,text\n1.wav,one\n0.wav,nought\n")
    return folder


def test_tables_and_folders_name_sounds_and_texts(tmp_path: Path) -> None:
    folder = spoken(tmp_path / "a")
    for place in (folder, folder / "metadata.csv"):
        source = SoundTable(str(place), str(place))
        samples = source.load("test")
        assert [round(float(sound.values[0]), 2) for sound in samples.inputs] == [0.25, 0]
        assert samples.references == ["one", "nought"]
        assert source.load("train").references is None
        assert source.check_first("test") == 1
    assert samples.take([1]).references == ["nought"]
    (folder / "metadata.csv").unlink()
    source = SoundTable(str(folder), str(folder))
    assert len(source.load("train")) == 3
    with pytest.raises(DataError, match=r"has no metadata.csv or metadata.jsonl with the columns audio and text"):
        source.load("test")


def test_wrong_tables_are_named(tmp_path: Path) -> None:
    folder = spoken(tmp_path / "a")
    with pytest.raises(DataError, match=r"metadata.csv, row 1: no value in column file"):
        SoundTable(str(folder), str(folder), audio="file").load("train")
    with pytest.raises(DataError, match=r"metadata.csv has no column said \(data.answer\)"):
        SoundTable(str(folder), str(folder), answer="said").load("test")
    with pytest.raises(DataError, match=r"no.txt must be a folder or a table ending in .tsv"):
        SoundTable("no.txt", "no.txt").load("train")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"b has no sounds, which end in .wav"):
        SoundTable(str(tmp_path / "b"), "b").load("train")
    (folder / "rows.jsonl").write_text(json.dumps({"audio": "9.wav", "text": "nine"}))
    with pytest.raises(DataError, match=r"9.wav is not a file"):
        SoundTable(str(folder / "rows.jsonl"), "b").check_first("train")
