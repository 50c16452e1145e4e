"""Oracles: the handlers before the block, and the statuses that shells give to signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from epmq_cli.runtime.signals import Interrupted, as_exceptions, raise_received, received
from tests.faults.driver import forked

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def nothing() -> None:
    """A `last_words` callback that does nothing."""


def test_the_handlers_are_restored_if_no_signal_arrives() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with as_exceptions(nothing):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert received() is None
    raise_received()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_raised_and_later_ones_are_ignored(number: signal.Signals) -> None:
    def body() -> None:
        with pytest.raises(Interrupted) as stopped, as_exceptions(nothing):
            os.kill(os.getpid(), number)
            time.sleep(10)
        assert stopped.value.number == number == received()
        for later in SIGNALS:
            os.kill(os.getpid(), later)
        with pytest.raises(Interrupted):
            raise_received()

    assert forked(body) == 0


def test_a_process_that_cannot_run_its_handler_is_ended(tmp_path: Path) -> None:
    """The main thread, with its signals blocked, stands for one that waits in a library."""

    def body() -> None:
        with as_exceptions(lambda: (tmp_path / "words").touch(), grace=0.1):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60)

    assert forked(body) == 143
    assert (tmp_path / "words").exists()


def test_in_another_thread_nothing_is_changed() -> None:
    before, during = signal.getsignal(signal.SIGTERM), []

    def body() -> None:
        with as_exceptions(nothing):
            during.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert during == [before]
