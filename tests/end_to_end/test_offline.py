"""Oracle: sockets that fail the test on any connection or name lookup."""

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
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The network requests so far; all of them fail."""
    found: list[Any] = []

    def ask(*arguments: Any, **_: Any) -> Any:
        found.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(socket.socket, "connect", ask)
    return found


def test_a_run_and_its_verification_send_no_requests(clip_hub: Path, tmp_path: Path, requests: list[Any]) -> None:
    verify(run_in(tmp_path, clip_hub, "calib.samples=8", "eval.samples=8"), True, "cpu", None)
    assert requests == []


def test_a_run_sends_no_requests_when_online(
    bert_hub: Path, tmp_path: Path, requests: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    run_in(tmp_path, bert_hub, "calib.samples=8", "eval.samples=8")
    assert requests == []
    with pytest.raises(ModelError):
        locate("someone/something", "base")
    assert requests  # the fixture records requests


def test_missing_models_and_data_cause_no_requests_when_offline(requests: list[Any]) -> None:
    with pytest.raises(
        ModelError, match="someone/something was not found locally and cannot be downloaded from the hub"
    ):
        locate("someone/something", "base")
    for count in (None, 3):
        with pytest.raises(DataError, match="data set someone/something cannot be loaded"):
            Hub("someone/something").load("train", count)
    assert requests == []


def test_missing_models_are_requested_when_online(
    requests: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    with pytest.raises(ModelError):
        locate("someone/something", "base")
    assert requests
