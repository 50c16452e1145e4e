"""Oracle: a new answer of transformers with an empty cache."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from epmq_cli.models import answers, model_class, processor_files
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.processor_files import ProcessorFiles


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache folder. The in-memory caches are empty too."""
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
    forget()
    return tmp_path / "cache" / "transformers"


def forget() -> None:
    model_class._model_class.cache_clear()
    model_class._ask.cache_clear()


def refuse(*_: Any) -> Any:
    raise AssertionError("transformers is asked again")


@pytest.mark.parametrize("hub", ["bert_hub", "clip_hub"])
def test_a_cached_class_is_equal_and_not_asked_for_again(
    hub: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ModelFolder(request.getfixturevalue(hub) / "base", "base")
    first = model_class.model_class(base.config, base.infos)
    asked = model_class._ask(json.dumps(base.config, sort_keys=True, default=str), frozenset(top_level_names(base)))
    forget()
    with monkeypatch.context() as patched:
        patched.setattr(model_class, "_ask", refuse)
        cached = model_class.model_class(base.config, base.infos)
    assert first is not None and cached is not None and asked is not None
    for field in fields(cached):
        if field.name != "renamings":
            assert getattr(cached, field.name) == getattr(first, field.name) == getattr(asked, field.name)
    assert [type(renaming) for renaming in cached.renamings()] == [type(renaming) for renaming in asked.renamings()]


def top_level_names(folder: ModelFolder) -> set[str]:
    return {name.partition(".")[0] for name in folder.infos}


def test_changed_tokenizer_files_are_asked_about_again(
    bert_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(bert_hub / "base", tmp_path / "base")
    files = ProcessorFiles(folder).files
    with monkeypatch.context() as patched:
        patched.setattr(processor_files, "_tokenizer", refuse)
        assert ProcessorFiles(folder).files == files
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 7}))
        with pytest.raises(AssertionError, match="asked again"):
            ProcessorFiles(folder)


def test_another_version_of_transformers_is_asked_again(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers.cached_answer({"q": 1}, lambda: [1], __file__) == [1]
    assert answers.cached_answer({"q": 1}, refuse, __file__) == [1]
    monkeypatch.setattr(answers, "installed_version", lambda name: "0")
    assert answers.cached_answer({"q": 1}, lambda: [2], __file__) == [2]
    assert len(list(empty_cache.glob("*.json"))) == 2


def test_without_a_writable_cache_every_question_is_asked(empty_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty_cache.parent.mkdir()
    empty_cache.write_text("no folder")
    assert [answers.cached_answer({"q": 1}, partial(list, (number,)), __file__) for number in range(2)] == [[0], [1]]
    assert not caplog.records
