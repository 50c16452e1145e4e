"""Oracles: the handlers that were there before, and the statuses that shells give to signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from epmq_cli.runtime.signals import Interrupted, deferred, handle_signals
from tests.faults.driver import forked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_raised_and_its_handler_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped, handle_signals(lambda: None):
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert stopped.value.number == number
    assert signal.getsignal(number) is before


def test_a_block_that_nothing_interrupts_ends_as_it_would() -> None:
    with handle_signals(lambda: None), deferred():
        pass


def test_a_process_that_does_not_come_to_its_handler_is_ended(tmp_path: Path) -> None:
    """The main thread, with its signals blocked, stands for one that waits in a library."""

    def body() -> None:
        with handle_signals(lambda: (tmp_path / "words").touch(), grace=0.1):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60)

    assert forked(body) == 143
    assert (tmp_path / "words").exists()


def test_in_another_thread_nothing_is_changed() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def body() -> None:
        with handle_signals(lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]
