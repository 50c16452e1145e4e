"""Oracle: the contents of `.resume`, damaged or planted; the run refuses them in a sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from epmq_cli.errors import RunError
from epmq_cli.pipeline.progress import RunProgress, opened
from epmq_cli.store.run_lock import FOLDER
from tests.faults.driver import PACK, at_stage, attempt
from tests.helpers.hubs import run_in
from tests.helpers.tiers import every

OPTIONS = ("guidance=feature", "eval.samples=8", "guidance.heads=always")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def interrupted_run(bert_hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed before packing."""
    folder = tmp_path_factory.mktemp("left") / "run"
    assert attempt(folder, bert_hub, *OPTIONS, hook=at_stage(PACK)) == -signal.SIGKILL
    return folder


def pickled(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path)


def foreign(path: Path) -> None:
    save_file({"a": torch.ones(2)}, path)


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the header of an entry."""

    def act(path: Path) -> None:
        tensors, length = load_file(path), int.from_bytes(path.read_bytes()[:8], "little")
        found = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["epmq"])
        change(found)
        save_file(tensors, path, {"epmq": json.dumps(found)})

    return act


GRID = {"encoder.layer.0.attention.self.query": {"spec": {"bits": 5}, "dtype": "nothing"}}
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "scores cut off": ("*/*/parts.json", lambda path: path.write_text('{"first')),
    "scores not UTF-8": ("*/*/parts.json", lambda path: path.write_bytes(b"\xff")),
    "scores deeply nested": ("*/*/parts.json", lambda path: path.write_text("[" * 100_000)),
    "starts missing": ("*/starts.json", Path.unlink),
    "starts no number": ("*/starts.json", lambda path: path.write_text("[]")),
    "answers cut off": ("*/*-0.safetensors", lambda path: path.write_bytes(path.read_bytes()[:20])),
    "answers a pickle": ("*/*-0.safetensors", pickled),
    "an entry cut off": ("*/last/*.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "an entry a pickle": ("*/last/*.safetensors", pickled),
    "an entry of somebody else": ("*/last/*.safetensors", foreign),
    "an entry without records": ("*/last/*.safetensors", header(lambda found: found.pop("records"))),
    "an entry with other records": ("*/last/*.safetensors", header(lambda found: found.update(records=[{"x": 1}]))),
    "an entry with tensors it lacks": ("*/last/*.safetensors", header(lambda found: found["tensors"].append("x"))),
    "an entry of no weights": ("*/last/*.safetensors", header(lambda found: found.update(weights=3))),
    "an entry of another grid": ("*/last/0000.safetensors", header(lambda found: found.update(weights=GRID))),
}


def test_an_interrupted_run_leaves_only_json_and_safetensors(interrupted_run: Path) -> None:
    found = [path for path in (interrupted_run / FOLDER).rglob("*") if path.is_file()]
    assert {path.suffix for path in found if path.name != "lock"} == {".json", ".safetensors"}
    for path in found:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
    assert (interrupted_run / FOLDER / "lock").read_bytes() == b""


@pytest.mark.parametrize("case", every(2, DAMAGE))
def test_damaged_entries_are_refused_in_one_sentence(
    case: str, interrupted_run: Path, bert_hub: Path, tmp_path: Path
) -> None:
    pattern, damage = DAMAGE[case]
    run = tmp_path / "run"
    shutil.copytree(interrupted_run, run)
    path = next(iter(sorted((run / FOLDER).glob(pattern))))
    damage(path)
    with pytest.raises(RunError, match=r"is damaged \(.*\); start from the beginning with resume=never") as raised:
        run_in(run, bert_hub, *OPTIONS)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_resume_never_ignores_existing_entries(interrupted_run: Path, bert_hub: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted_run, run)
    for path in (run / FOLDER).rglob("*.*"):
        path.write_text("damaged")
    run_in(run, bert_hub, *OPTIONS, "resume=never")
    assert not (run / FOLDER).exists()


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_damaged_run_of_another_key_is_named(text: str, tmp_path: Path) -> None:
    opened(tmp_path, {"bits": 4}, "auto")
    (identity,) = (tmp_path / FOLDER).glob("*/identity.json")
    identity.write_text(text)
    with pytest.raises(RunError, match="identity.json is damaged"):
        opened(tmp_path, {"bits": 3}, "auto")


def test_values_under_another_key_are_not_read(tmp_path: Path) -> None:
    opened(tmp_path, {"bits": 4}, "auto").value("x", lambda: 1)
    (tmp_path / FOLDER / "0123456789abcdef").mkdir()
    (tmp_path / FOLDER / "0123456789abcdef" / "x.json").write_text("2")
    assert opened(tmp_path, {"bits": 3}, "auto").value("x", lambda: 3) == 3
    assert opened(tmp_path, {"bits": 4}, "auto").value("x", lambda: 3) == 1


def test_tensors_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    RunProgress(tmp_path).tensors("x", CPU, lambda: {"a": torch.ones(1)})
    (tmp_path / "x-0.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"x-0.safetensors is damaged .*; start from the beginning with resume=never"):
        RunProgress(tmp_path).tensors("x", CPU, dict)


def test_a_pipe_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    place = tmp_path / FOLDER / "0" / "identity.json"
    place.parent.mkdir(parents=True)
    os.mkfifo(place)
    signal.alarm(10)
    with pytest.raises(
        RunError, match=r"identity.json is damaged \(not a regular file\); start from the beginning with resume=never"
    ):
        opened(tmp_path, {"config": {}}, "auto")
    signal.alarm(0)


def test_a_file_without_permission_is_not_reported_as_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, encoding: str | None = None) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    place = tmp_path / FOLDER / "0" / "identity.json"
    place.parent.mkdir(parents=True)
    place.touch()
    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(RunError, match=r"identity.json cannot be read \(Permission denied\); change its permissions"):
        opened(tmp_path, {"config": {}}, "auto")
