"""Oracle: images and arrays written by Pillow and numpy."""

from __future__ import annotations

import io
import logging
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epmq_cli.config.field_types import check_types
from epmq_cli.data.images import ImageFolder, Npz
from epmq_cli.errors import ConfigError, DataError


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (4, 4), (label * 100, index, 0)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def load(folder: Path, labels: list[str] | None = None) -> list[tuple[int, tuple[int, ...]]]:
    samples = ImageFolder(train=str(folder), test=str(folder), labels=labels).load("train")
    assert len(samples) == len(samples.inputs) == len(samples.labels)
    return [(int(label), image.getpixel((0, 0))) for label, image in zip(samples.labels, samples.inputs, strict=True)]


def test_sub_folders_are_classes_in_sorted_order(folders: Path) -> None:
    assert load(folders) == [(label, (label * 100, index, 0)) for label in (0, 1) for index in range(3)]


def test_labels_set_the_order(folders: Path) -> None:
    assert [label for label, _ in load(folders, ["dog", "cat"])] == [0, 0, 0, 1, 1, 1]
    assert load(folders, ["dog", "cat"])[0][1] == (100, 0, 0)


def test_classes_without_samples_are_allowed_when_named(folders: Path) -> None:
    assert {label for label, _ in load(folders, ["bird", "cat", "dog"])} == {1, 2}


def test_folders_that_do_not_fit_are_named(folders: Path) -> None:
    with pytest.raises(DataError, match="has the sub-folders dog, which are not among data.labels, cat; add them"):
        load(folders, ["cat"])
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load(folders / "nowhere")
    (folders / "empty").mkdir()
    with pytest.raises(
        DataError, match="has no sub-folders; it must have one sub-folder of images for each class, such as cat, dog"
    ):
        load(folders / "empty")
    with pytest.raises(ConfigError, match=r"data.labels must be different names of sub-folders, got \['a', 'a'\]"):
        load(folders, ["a", "a"])


LEFT = (".DS_Store", "cat/Thumbs.db", "cat/.hidden.png", "cat/._0.png", "dog/desktop.ini")
LEFT_FOLDERS = (".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "cat/.ipynb_checkpoints")


def test_hidden_files_and_folders_are_ignored(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = load(folders)
    for name in LEFT_FOLDERS:
        (folders / name).mkdir()
        Image.new("RGB", (4, 4)).save(folders / name / "0.png")
    for name in LEFT:
        Image.new("RGB", (4, 4)).save(folders / name, "PNG")
    caplog.clear()  # drops the messages of the first load, if the level was already INFO
    with caplog.at_level(logging.INFO, "epmq"):
        assert load(folders) == load(folders, ["cat", "dog"]) == wanted
    said = f"{folders}: epmq does not read hidden files and folders (10): $RECYCLE.BIN, .DS_Store, "
    said += ".ipynb_checkpoints, @eaDir, __MACOSX, ...; files"
    assert caplog.messages[0].startswith(said)
    assert caplog.messages[0].endswith("files that are not images by their extension (1): cat/notes.txt")


def test_folders_named_in_labels_or_by_one_character_are_classes(folders: Path) -> None:
    for name in ("@home", "@"):
        (folders / "cat").rename(folders / name)
        wanted = ["@home", "dog"] if name == "@home" else None
        samples = ImageFolder(str(folders), str(folders), wanted).load("train")
        assert samples.classes == (name, "dog")
        assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1]
        (folders / name).rename(folders / "cat")


def test_images_have_any_extension_that_pillow_reads(folders: Path) -> None:
    for name, kind in (
        ("3.jfif", "JPEG"),
        ("4.JPG", "JPEG"),
        ("5.webp", "WEBP"),
        ("6.Tiff", "TIFF"),
        ("7.jp2", "JPEG2000"),
    ):
        Image.new("RGB", (4, 4)).save(folders / "dog" / name, kind)
    assert [label for label, _ in load(folders)] == [0] * 3 + [1] * 8


def test_ignored_files_are_counted_and_reported(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folders / "dog" / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(folders / "dog" / "sub" / "0.png")
    Image.new("RGB", (4, 4)).save(folders / "stray.png")
    with caplog.at_level(logging.INFO, "epmq"):
        assert len(load(folders)) == 6
    assert caplog.messages == [
        f"{folders}: epmq does not read folders inside class folders (1): dog/sub; files beside the class folders (1): "
        "stray.png; files that are not images by their extension (1): cat/notes.txt"
    ]


def test_a_class_has_the_same_number_in_both_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, names in (("train", ("ant", "cat")), ("test", ("bee", "cat", "e\u0301mu"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "0.png")
    source = ImageFolder(str(tmp_path / "train"), str(tmp_path / "test"))
    with caplog.at_level(logging.WARNING, "epmq"):
        train, test = source.load("train"), source.load("test")
    assert train.classes == test.classes == ("ant", "bee", "cat", "\xe9mu")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 2], [1, 2, 3])
    assert caplog.messages == [
        f"{tmp_path / 'train'} has no images of 2 of the 4 classes: bee, \xe9mu",
        f"{tmp_path / 'test'} has no images of 1 of the 4 classes: ant",
    ]
    shutil.rmtree(tmp_path / "train")
    with caplog.at_level(logging.INFO, "epmq"):
        assert source.load("test").labels.tolist() == [0, 1, 2]
    assert f"{tmp_path / 'train'} is not a folder, so the classes are the sub-folders of" in caplog.text


def test_the_error_for_a_split_without_images_names_its_contents(tmp_path: Path) -> None:
    for name in ("test/cat", "test/dog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"test has no images .*not images by their extension \(2\): cat/0.heic, dog/0"):
        load(tmp_path / "test")
    with pytest.raises(
        DataError, match=r"has no images .*folders inside class folders \(2\): test/cat, test/dog\); put"
    ):
        load(tmp_path)


def test_a_corrupted_image_is_named_when_it_is_opened(folders: Path) -> None:
    (folders / "dog" / "1.png").write_bytes((folders / "dog" / "1.png").read_bytes()[:30])
    with pytest.raises(DataError, match=r"dog/1.png is not an image that Pillow can read"):
        load(folders)


@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 4, 4, 1), (5, 4, 4, 3)])
@pytest.mark.parametrize("labels", [np.arange(5, dtype=np.uint8), np.arange(5)[:, None], np.arange(5.0)])
def test_npz_arrays_are_read(shape: tuple[int, ...], labels: np.ndarray, tmp_path: Path) -> None:
    """Grey pictures with or without a channel axis; labels in a column, as in MedMNIST, or as floats."""
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "x.npz", test_images=images, test_labels=labels)
    samples = Npz(str(tmp_path / "x.npz")).load("test")
    wanted = np.broadcast_to(images if images.ndim == 4 else images[..., None], (5, 4, 4, 3))
    assert np.array_equal(np.stack([np.asarray(image) for image in samples.inputs]), wanted)
    assert samples.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"test_images": np.zeros((2, 4, 4), np.uint8)},
            "cannot be read as npz with arrays test_images and test_labels",
        ),
        (
            {"test_images": np.zeros((2, 4, 4)), "test_labels": np.zeros(2)},
            r"must be uint8 .* got float64 \(2, 4, 4\)",
        ),
        ({"test_images": np.zeros((2, 4, 4), np.uint8), "test_labels": np.zeros(3)}, r"labels float64 \(3,\)"),
        ({"test_images": np.zeros((2, 4, 4), np.uint8), "test_labels": np.array([0.5, 1])}, r"labels float64 \(2,\)"),
        ({"test_images": np.zeros((2, 4, 4), np.uint8), "test_labels": np.eye(2)}, r"labels float64 \(2, 2\)"),
        ({"test_images": np.zeros((2, 4, 4, 4), np.uint8), "test_labels": np.zeros(2)}, r"got uint8 \(2, 4, 4, 4\)"),
        ({"test_images": np.array([{}], dtype=object), "test_labels": np.zeros(1)}, "cannot be read as npz"),
    ],
)
def test_bad_npz_files_are_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        Npz(str(tmp_path / "x.npz")).load("test")


def test_files_that_are_not_npz_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"nothing")
    for path in ("x.npz", "gone.npz"):
        with pytest.raises(DataError, match="cannot be read as npz"):
            Npz(str(tmp_path / path)).load("train")


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def of_shape(rows: int) -> bytes:
    """An npz whose header claims this number of rows."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({rows}, 4, 4)}}".encode().ljust(117) + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train_images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return file.getvalue()


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> object:
        return Path.touch, (self._path,)


SOUND = npz(train_images=np.zeros((20, 40, 40), np.uint8), train_labels=np.zeros(20, np.int64))


@pytest.mark.parametrize(
    "content",
    [b"", SOUND[:-30], SOUND.replace(SOUND[150:160], bytes(10)), of_shape(1 << 40), of_shape(-1)],
    ids=["empty", "truncated", "damaged", "huge", "negative"],
)
def test_damaged_and_hostile_npz_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a.npz cannot be read as npz with arrays") as raised:
        Npz(str(tmp_path / "a.npz")).load("train")
    assert "\n" not in str(raised.value)


def test_pickles_in_npz_files_are_not_loaded(tmp_path: Path) -> None:
    evil = Evil(tmp_path / "ran")
    np.savez(tmp_path / "a.npz", train_images=np.array([evil], dtype=object), train_labels=np.zeros(1))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(evil))
    with (tmp_path / "c.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    for name in ("a", "b", "c"):
        with pytest.raises(DataError, match="cannot be read as npz with arrays"):
            Npz(str(tmp_path / f"{name}.npz")).load("train")
    assert not (tmp_path / "ran").exists()


def test_an_image_too_large_for_memory_is_named(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)  # above twice that Pillow raises; these have 16
    with pytest.raises(DataError, match=r"0.png is not an image that Pillow can read .*; remove or replace it"):
        load(folders)


def test_labels_may_be_numbers_if_folders_have_such_names(tmp_path: Path) -> None:
    """The order is that of the config, whose numbers have no quotes."""
    for split in ("train", "test"):
        for name in (0, 1, 10, 2):
            (tmp_path / split / str(name)).mkdir(parents=True)
            Image.new("RGB", (2, 2), (name, 0, 0)).save(tmp_path / split / str(name) / "a.png")
    fields = {"train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "labels": [0, 1, 2, 10]}
    check_types("data", ImageFolder, fields)
    samples = ImageFolder(**fields).load("test")
    assert [image.getpixel((0, 0))[0] for image in samples.inputs] == [0, 1, 2, 10]
    assert samples.classes == ("0", "1", "2", "10")
