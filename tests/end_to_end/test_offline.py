"""Oracle: sockets that fail the test when anything connects or looks up a name."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from epmq_cli.commands.verify import verify
from epmq_cli.data.hub import Hub
from epmq_cli.errors import DataError, ModelError
from epmq_cli.models.resolve import locate
from tests.helpers.hubs import run_in


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the network; it answers nothing."""
    found: list[Any] = []

    def ask(*arguments: Any, **_: Any) -> Any:
        found.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(socket.socket, "connect", ask)
    return found


def test_a_run_and_its_verification_ask_nothing(clip_hub: Path, tmp_path: Path, asked: list[Any]) -> None:
    verify(run_in(tmp_path, clip_hub, "calib.samples=8", "eval.samples=8"), True, "cpu", None)
    assert asked == []


def test_transformers_asks_nothing_online_either(
    bert_hub: Path, tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    run_in(tmp_path, bert_hub, "calib.samples=8", "eval.samples=8")
    assert asked == []
    with pytest.raises(ModelError):
        locate("someone/something", "base")
    assert asked  # what asks is seen


def test_what_is_not_there_is_not_asked_for_offline(asked: list[Any]) -> None:
    with pytest.raises(
        ModelError, match="someone/something was not found locally and cannot be downloaded from the hub"
    ):
        locate("someone/something", "base")
    for count in (None, 3):
        with pytest.raises(DataError, match="data set someone/something cannot be loaded"):
            Hub("someone/something").load("train", count)
    assert asked == []


def test_it_would_be_asked_for_online(asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    with pytest.raises(ModelError):
        locate("someone/something", "base")
    assert asked
