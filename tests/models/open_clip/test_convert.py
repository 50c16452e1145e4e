"""Oracles: the folder that an undisturbed conversion writes, and a full disk."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest

from epmq_cli.errors import ModelError
from epmq_cli.models.open_clip import convert
from epmq_cli.models.open_clip.convert import converted
from tests.faults.driver import forked
from tests.helpers.tiers import every
from tests.models.open_clip.test_tensors import build, stored


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("file", "content"), every(3, [("model.safetensors", b""), ("manifest.json", None), (None, b""), (None, None)])
)
def test_a_damaged_conversion_is_converted_again(file: str | None, content: bytes | None, tmp_path: Path) -> None:
    """After a power cut, files can be empty or missing, or the folder can be empty."""
    source = stored(tmp_path / "base", build())
    folder = converted(source, "base")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in [path for path in folder.iterdir() if file in (None, path.name)]:
        path.unlink() if content is None else path.write_bytes(content)
    assert converted(source, "base") == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_conversion_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(convert, "sync", synced.append)
    folder = converted(stored(tmp_path / "base", build()), "base")
    assert {path.name for path in synced[:-2]} == {path.name for path in folder.iterdir()}
    assert synced[-2].name.startswith(f".{folder.name}")
    assert synced[-1] == folder.parent


@pytest.mark.parametrize("room", [1000, 200_000])
def test_a_full_disk_ends_a_conversion_in_one_sentence(room: int, tmp_path: Path, cache: Path) -> None:
    """`room`: the largest size of a file, in bytes."""
    source = stored(tmp_path / "base", build())
    message = tmp_path / "message"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    def body() -> None:
        with pytest.raises(ModelError) as error:
            converted(source, "base")
        message.write_text(str(error.value))

    assert forked(body, limit) == 0
    assert message.read_text().startswith("base: the converted model cannot be written to")
    assert message.read_text().endswith("free some space, or set EPMQ_CACHE to a folder on a larger disk")
    assert not [*(cache / "open_clip").iterdir()]


def test_a_tokenizer_that_does_not_fit_on_the_disk_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizers library raises Exception itself; other errors are defects and stay unchanged."""
    source = stored(tmp_path / "base", build())
    for error, seen in ((Exception("No space left on device"), ModelError), (KeyError("x"), KeyError)):
        monkeypatch.setattr(convert, "tokenizer", Mock(side_effect=error))
        with pytest.raises(seen):
            converted(source, "base")
