"""Oracle: a stub of the hub's API that answers with the headers of a local model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from epmq_cli.errors import ModelError
from epmq_cli.models.headers import SafetensorsHeaders
from epmq_cli.models.hub_headers import hub_headers, on_this_machine
from tests.conftest import Run


@pytest.fixture
def hub(clip_hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub with clip_hub's folders as repositories of the owner `me`."""

    def metadata(repo: str, revision: str | None = None) -> SimpleNamespace:
        infos = SafetensorsHeaders(clip_hub / repo.partition("/")[2], "model").infos
        tensors = {name: SimpleNamespace(shape=list(info.shape), dtype=info.dtype) for name, info in infos.items()}
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    def download(repo: str, file: str, revision: str | None = None) -> str:
        return str(clip_hub / repo.partition("/")[2] / file)

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return clip_hub


def test_headers_of_the_hub_are_those_of_the_files(hub: Path) -> None:
    config, infos = hub_headers("me/base", None, "base")
    assert config["model_type"] == "clip"
    assert infos == SafetensorsHeaders(hub / "base", "base").infos
    found = on_this_machine("me/base@v2", "base")
    assert not isinstance(found, Path)
    assert (found["repo"], found["revision"]) == ("me/base", "v2")


def test_a_hub_that_does_not_answer_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"base: me/base is not on this machine, and its headers cannot be read"):
        hub_headers("me/base", None, "base")


def test_a_run_is_planned_before_anything_is_downloaded(hub: Path, epmq_inside: Run) -> None:
    given = (
        "--config-dir",
        str(hub / "configs"),
        "suite=mini",
        "suite.base=me/base",
        "suite.tasks.first.expert=me/first",
    )
    result = epmq_inside("run", "--plan", *given, "suite.tasks.second.expert=me/second", "group_size=16")
    assert result.returncode == 0, result.stderr
    assert "planned from the headers on the hub" in " ".join(result.stdout.split())
    assert "all stages" in result.stdout
    other = epmq_inside("run", "--plan", *given, "suite.tasks.second.expert=me/none", "group_size=16")
    assert other.returncode == 1
