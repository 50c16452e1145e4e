"""Oracles: hashlib on the files, and that any change of what is read changes the fingerprint."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epmq_cli.data.hub import Pictures
from epmq_cli.data.images import ArrayImages, ImageFiles
from epmq_cli.data.samples import Samples
from epmq_cli.pipeline import fingerprints
from epmq_cli.pipeline.fingerprints import Fingerprints, of_samples, of_tensors


def old(path: Path, content: bytes) -> Path:
    """A file that was written an hour ago. Only the clock of its inode says otherwise, which cannot be set."""
    path.write_bytes(content)
    hour = path.stat().st_mtime_ns - 3600 * 10**9
    os.utime(path, ns=(hour, hour))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read whole, one after the other."""
    found: list[Path] = []
    real = fingerprints.content

    def content(path: Path) -> Any:
        found.append(path)
        return real(path)

    monkeypatch.setattr(fingerprints, "content", content)
    return found


def test_a_file_is_read_once_and_again_when_it_changed(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED", 0)
    path = old(tmp_path / "model.safetensors", b"one")
    for _ in range(3):  # three jobs
        assert Fingerprints(tmp_path / "known").file(path) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 1
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time of writing are as before
    assert Fingerprints(tmp_path / "known").file(path) == hashlib.sha256(b"two").hexdigest()
    assert len(reads) == 2


def test_a_file_that_was_just_written_is_not_trusted_to_stay(tmp_path: Path, reads: list[Path]) -> None:
    path = old(tmp_path / "model.safetensors", b"one")
    for _ in range(2):
        Fingerprints(tmp_path / "known").file(path)
    assert len(reads) == 2
    assert not (tmp_path / "known").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"state": 1}', "{" * 5000])
def test_a_damaged_memory_is_made_again(
    content: str, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED", 0)
    path = old(tmp_path / "model.safetensors", b"one")
    Fingerprints(tmp_path / "known").file(path)
    (memory,) = (tmp_path / "known").iterdir()
    memory.write_text(content)
    for _ in range(2):
        assert Fingerprints(tmp_path / "known").file(path) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 2


def test_a_model_is_the_files_that_are_read_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "merges.txt", ".hidden.json", "optimizer.pt", "README.md"):
        (folder / name).write_text(name)
    found = Fingerprints(tmp_path / "known").model(folder)
    assert set(found) == {"model.safetensors", "config.json", "merges.txt"}
    shutil.copytree(folder, tmp_path / "copy")
    assert Fingerprints(tmp_path / "known").model(tmp_path / "copy") == found
    assert list(Fingerprints(tmp_path / "known").model(folder / "optimizer.pt")) == ["optimizer.pt"]


def test_tensors_are_known_by_name_type_shape_and_value() -> None:
    tensors = [
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(())},
        {"a": -torch.zeros(2, 3)},
    ]
    assert len({of_tensors(each) for each in tensors}) == len(tensors)
    assert of_tensors({"a": torch.arange(6).view(2, 3).T}) == of_tensors({"a": torch.arange(6).view(2, 3).T.clone()})


def _samples(inputs: Any, labels: int = 0) -> Samples:
    return Samples(inputs, torch.full((len(inputs),), labels))


def _recoloured(image: Image.Image) -> Image.Image:
    image.putpalette(bytes(range(255, -1, -1)) * 3)
    return image


def test_samples_are_known_by_inputs_order_and_labels(tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    images = [Image.fromarray(each) for each in pixels]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    stored = [{"bytes": (tmp_path / f"{index}.png").read_bytes(), "path": None} for index in range(2)]
    samples = [
        _samples(["red film", "blue"]),
        _samples(["blue", "red film"]),
        _samples(["red film", "blue"], 1),
        _samples(["red film"]),
        _samples([("red", "film"), ("blue", "")]),
        _samples(images),
        _samples(images[::-1]),
        _samples([image.convert("P") for image in images]),
        _samples([image.convert("P") for image in images[:1]]),
        _samples([_recoloured(image.convert("P")) for image in images[:1]]),
        _samples(ArrayImages(pixels)),
        _samples(ImageFiles([tmp_path / "0.png", tmp_path / "1.png"])),
        _samples(ImageFiles([tmp_path / "1.png", tmp_path / "0.png"])),
        _samples([torch.arange(5)]),
        _samples([torch.arange(6)]),
    ]
    found = [of_samples(each) for each in samples]
    assert None not in found
    assert len(set(found)) == len(samples)
    assert of_samples(_samples(Pictures(stored, "here"))) == found[11]  # both are known by what the files hold
    assert of_samples(samples[6].take([1, 0])) == found[5]
    assert of_samples(_samples([object()])) is None
