"""Ctrl-C and SIGTERM: what is being written is finished, and what is behind it is cleaned up.

Python runs its handlers between two steps of its own. A process that waits for others, or for one long calculation,
does not come to that: it is ended a while after the signal, and what it leaves is whole, as after a power cut. Only the
first signal counts: a second one would break off the cleaning up.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 20.0  # seconds; Slurm, for one, waits for 30 before it kills
STATUS: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""What a process that was ended by a signal exits with, by the convention of shells."""


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by a signal; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_holding: list[bool] = []
_waiting: list[int] = []
_seen: list[int] = []


def seen() -> int | None:
    """The signal that this process was sent, if there was one: it is to end with that one's status."""
    return _seen[0] if _seen else None


@contextmanager
def deferred() -> Iterator[None]:
    """Signals that come inside the block are raised at its end."""
    _holding.append(True)
    try:
        yield
    finally:
        _holding.pop()
        if _waiting and not _holding:
            raise Interrupted(_waiting.pop())


@contextmanager
def answered() -> Iterator[None]:
    """Inside the block SIGINT and SIGTERM raise `Interrupted` in the main thread, the first of them alone; behind it
    all further ones are ignored, to the end of the process. Where there was none, one that comes while Python exits
    ends it without a traceback. Nothing is done elsewhere than in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _seen.clear()
    before = {number: signal.signal(number, _raise) for number in STATUS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _seen else handler)
        if not _seen:
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


@contextmanager
def handle_signals(last_words: Callable[[], None], grace: float = GRACE) -> Iterator[None]:
    """As `answered`, but that the handlers are put back in any case. One that came before is raised at once.

    Where that has not ended the block in `grace` seconds, `last_words` is called and the process ends. Nothing is
    done elsewhere than in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(reading, over, last_words, grace), daemon=True)
    watcher.start()
    before = {number: signal.signal(number, _raise) for number in STATUS}
    if _raise not in before.values():
        _seen.clear()
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        if _seen:  # swallowed by a library
            raise Interrupted(_seen[0])
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        _waiting.clear()
        os.close(writing)
        watcher.join()
        os.close(reading)


def _raise(number: int, _: FrameType | None) -> None:
    if _seen:
        return
    _seen.append(number)
    if _holding:
        _waiting.append(number)
    else:
        raise Interrupted(number)


def _watch(reading: int, over: threading.Event, last_words: Callable[[], None], grace: float) -> None:
    """Woken by a signal even where the main thread does not come to its handler."""
    while number := os.read(reading, 1):
        if number[0] in STATUS and not over.wait(grace):
            last_words()
            os._exit(STATUS[number[0]])
