"""SIGINT and SIGTERM become an exception in the main thread.

Files and folders are written atomically (store/atomic.py), so a process may end at any point. The exception only lets
it remove its temporary files. The first signal counts; later ones are ignored, because they would interrupt that
clean-up.

Python runs signal handlers between bytecode instructions. A process that waits for another process or for one long
computation runs none: it is ended `GRACE` seconds after the signal.
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
"""The exit status of a process that a signal ended, by the convention of shells."""


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by a signal; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_received: list[int] = []


def received() -> int | None:
    """The signal that this process received, if any."""
    return _received[0] if _received else None


def raise_received() -> None:
    """Raises the signal's exception again, in case a library swallowed it."""
    if _received:
        raise Interrupted(_received[0])


@contextmanager
def as_exceptions(last_words: Callable[[], None], grace: float = GRACE) -> Iterator[None]:
    """Inside the block, the first SIGINT or SIGTERM raises `Interrupted`. If the process is still running `grace`
    seconds later, `last_words` is called and the process ends. Outside the main thread this does nothing.

    After the block, later signals stay ignored if one was received. Otherwise a signal that arrives while Python exits
    ends the process without a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    over = threading.Event()
    threading.Thread(target=_end_late, args=(reading, over, grace, last_words), daemon=True).start()
    before = {number: signal.signal(number, _raise) for number in STATUS}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _received else handler)
        if not _received:
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


def _raise(number: int, _: FrameType | None) -> None:
    if not _received:
        _received.append(number)
        raise Interrupted(number)


def _end_late(reading: int, over: threading.Event, grace: float, last_words: Callable[[], None]) -> None:
    """Reads the numbers of signals, which the system delivers even while the main thread cannot run its handler."""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] in STATUS and not over.wait(grace):
                last_words()
                os._exit(STATUS[number[0]])
