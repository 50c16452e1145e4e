"""Oracle: the output on a terminal, and in a file."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from epmq_cli.runtime import console


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_shown_on_terminals_only(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "messages", Console(file=screen, force_terminal=terminal, width=100))
    with caplog.at_level(logging.INFO, logger="epmq"):
        assert list(console.track(["a", "b", "c"], "merge")) == ["a", "b", "c"]
    assert "merge: 3 steps" in caplog.text
    assert ("merge" in screen.getvalue()) == terminal
    assert ("left" in screen.getvalue()) == terminal


def test_a_bar_counts_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "messages", Console(file=screen, force_terminal=True, width=100))
    with console.bar("score", 2) as advance:
        advance(1)
        advance(1)
    assert "2/2" in screen.getvalue()


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
    monkeypatch.setattr(console, "messages", Console(file=screen, width=200))
    logging.getLogger("epmq").warning("the tokenizer of %s\x1b[2J differs", "x")
    console.log.info("a fact")
    console.log.error("an error, which `complain` tells")
    assert screen.getvalue() == "warning: the tokenizer of x?[2J differs\n"
