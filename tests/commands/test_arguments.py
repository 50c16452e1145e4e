"""Oracle: the arguments that Hydra gets, and the variable that child processes inherit."""

from __future__ import annotations

import os

import pytest

from epmq_cli.cli import start
from epmq_cli.commands.arguments import take_progress
from epmq_cli.errors import ConfigError
from epmq_cli.runtime.verbosity import PROGRESS


@pytest.mark.parametrize(
    ("argument", "kind"), [("--quiet", "quiet"), ("progress=quiet", "quiet"), ("progress=json", "json")]
)
def test_the_kind_of_progress_is_no_override(argument: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS, "auto")
    assert take_progress(["merge=ties", argument, "-m"]) == ["merge=ties", "-m"]
    assert os.environ[PROGRESS] == kind


def test_a_wrong_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="progress must be one of auto, json, quiet, got loud"):
        take_progress(["progress=loud"])


def test_a_command_leaves_the_variable_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROGRESS, raising=False)
    with pytest.raises(SystemExit):
        start("list", ["--quiet", "nothing"])
    assert PROGRESS not in os.environ
