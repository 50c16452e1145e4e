"""Oracles: the lines on a terminal, in a file and for schedulers, with a clock that the test moves."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.console import Console

from epmq_cli.runtime import console, progress
from epmq_cli.runtime.verbosity import PROGRESS


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """The time in seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of progress, and memory of 1.5 GB."""
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    monkeypatch.setattr(progress, "status", lambda field: 1_500_000_000)
    return made


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool = False, kind: str = "auto") -> io.StringIO:
    """What messages go to from now on."""
    screen = io.StringIO()
    monkeypatch.setenv(PROGRESS, kind)
    monkeypatch.setattr(console, "messages", Console(file=screen, force_terminal=terminal, width=140))
    return screen


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_shown_on_terminals_only(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = shown(monkeypatch, terminal)
    with caplog.at_level(logging.INFO, logger="epmq"):
        assert list(progress.track(["a", "b", "c"], "merge")) == ["a", "b", "c"]
    assert "merge: 3 steps" in caplog.text
    assert ("3/3" in screen.getvalue()) == terminal
    assert ("left" in screen.getvalue()) == terminal


def test_a_file_gets_a_line_every_ten_seconds(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = shown(monkeypatch)
    with progress.bar("calibrate", 8) as advance:
        for _ in range(8):
            clock.now += 4
            advance(1)
    assert screen.getvalue().splitlines() == [
        "calibrate: 37% (3 of 8, 4.0 s each), 20 s left, memory 1.50 GB",
        "calibrate: 75% (6 of 8, 4.0 s each), 8.0 s left, memory 1.50 GB",
    ]


def test_time_left_is_that_of_parts_of_the_same_kind(clock: Clock) -> None:
    """Blocks of two parts, of 1 s and 3 s, whatever their work; the first one compiles for 9 s, the stem takes 50."""
    block = [progress.Part("a", 3), progress.Part("b", 1)]
    meter = progress.Meter("calibrate", 9, [progress.Part("stem", 0), *4 * block])
    left = []
    for seconds in (50, 10, 3, 1, 3, 1, 3, 1, 3):
        clock.now += seconds
        meter.advance(1)
        left.append(meter.left)
    assert left[:2] == [None, None]
    assert left[4:] == pytest.approx([8, 7, 4, 3, 0])
    meter = progress.Meter("calibrate", 4, 4 * [progress.Part("a", 2)])
    clock.now += 5
    meter.advance(1)
    clock.now += 2
    assert meter.left == pytest.approx(13)


def test_schedulers_get_lines_of_json(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = shown(monkeypatch, kind="json")
    with progress.bar("score", 4) as advance:
        clock.now += 2
        advance(2)
        clock.now += 0.5
        advance(2)
    progress.finished("score", 2.5, 7)
    found = [json.loads(line) for line in screen.getvalue().splitlines()]
    same = {"stage": "score", "total": 4, "memory": 1_500_000_000}
    assert found == [
        {"event": "begin", "done": 0, "seconds": 0.0, "left": None, **same},
        {"event": "progress", "done": 2, "seconds": 2.0, "left": 2.0, **same},
        {"event": "end", "done": 4, "seconds": 2.5, "left": 0.0, **same},
        {"event": "stage", "stage": "score", "seconds": 2.5, "peak": 7},
    ]


def test_stages_stay_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = shown(monkeypatch, terminal=True)
    progress.finished("merge", 0.01, 2_000_000)
    progress.finished("calibrate", 71.2, 2_000_000)
    assert "merge" not in screen.getvalue()
    assert "1 min 11 s" in screen.getvalue()
    assert "2.00 MB" in screen.getvalue()


def test_speeds() -> None:
    assert progress.speed(12.34) == "12.3 a second"
    assert progress.speed(0.25) == "4.0 s each"


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_runs_show_nothing_but_warnings(
    terminal: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = shown(monkeypatch, terminal, kind="quiet")
    with caplog.at_level(logging.INFO, logger="epmq"), progress.bar("score", 2) as advance:
        clock.now += 60
        advance(1)
        progress.finished("score", 60, 7)
        console.say("results go to x")
    assert screen.getvalue() == ""
    assert [record.message for record in caplog.records][-1] == "results go to x"
