"""Oracle: the lines on the screen and in the log."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.console import Console

from epmq_cli.runtime import console
from epmq_cli.runtime.verbosity import PROGRESS


def test_messages_cannot_control_the_terminal_or_forge_lines_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "messages", Console(file=screen))
    monkeypatch.setattr(console, "complaints", Console(file=screen))
    with caplog.at_level(logging.INFO, logger="epmq"):
        console.say("tensor \x1b[2Ja\nERROR b\x9b")
    console.complain("tensor \x1b[2Ja\nERROR b\x9b")
    assert screen.getvalue() == "tensor ?[2Ja?ERROR b?\nepmq: tensor ?[2Ja?ERROR b?\n"
    assert [record.message for record in caplog.records] == ["tensor ?[2Ja?ERROR b?"]


def test_warnings_are_printed_and_other_lines_of_the_log_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "notices", Console(file=screen, width=200))
    logging.getLogger("epmq").warning("the tokenizer of %s\x1b[2J differs", "x")
    console.log.info("a fact")
    console.log.error("an error, which `complain` tells")
    assert screen.getvalue() == "warning: the tokenizer of x?[2J differs\n"


def test_messages_are_lines_of_json_for_schedulers(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setenv(PROGRESS, "json")
    for name in ("messages", "notices"):
        monkeypatch.setattr(console, name, Console(file=screen, width=20))
    console.say('5 "experts", on the central processing unit')
    console.log.warning("a tokenizer differs")
    assert [json.loads(line) for line in screen.getvalue().splitlines()] == [
        {"event": "message", "text": '5 "experts", on the central processing unit'},
        {"event": "warning", "text": "a tokenizer differs"},
    ]
