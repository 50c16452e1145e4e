"""Ends a command's process with a sentence and an exit status (errors.py lists them), never with a traceback."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from epmq_cli.runtime import distributed
from epmq_cli.runtime.signals import GRACE, STATUS, as_exceptions, received

MISTAKEN, UNREAD = 1, 141
"""The status of a user error, and of a broken output pipe, which shells derive from SIGPIPE."""


@contextmanager
def exit_on_error(report: Callable[[Exception], int], interrupted: str, debug: bool) -> Iterator[None]:
    """Wraps a command. Flushes its output and turns exceptions into an exit status.

    `report` explains an exception and returns the exit status; with `debug`, exceptions are raised instead.
    `interrupted`: the sentence after a signal, which replaces any error that a library raises when it is interrupted.
    """
    grace = GRACE if distributed.world_size() == 1 else 1  # torchrun stops the processes that wait for one that ended
    with as_exceptions(lambda: _complain(interrupted), grace):
        raised: BaseException | None = None
        try:
            yield
        except BaseException as error:
            raised = error
        number = received() or (signal.SIGINT if isinstance(raised, KeyboardInterrupt) else None)
        unwritten = _discard_unwritten()
        if number is not None:
            _complain(interrupted)
            sys.exit(STATUS[number])
        if isinstance(raised, BrokenPipeError) and unwritten is None and _reader_left():
            unwritten = raised  # Python drops what it could not write if it is more than its buffer
        if unwritten is not None and (_succeeded(raised) or isinstance(raised, OSError)):
            if not isinstance(unwritten, BrokenPipeError):
                _complain(f"the output cannot be written ({unwritten.strerror})")
            sys.exit(UNREAD if isinstance(unwritten, BrokenPipeError) else MISTAKEN)
        if isinstance(raised, Exception) and not debug:
            sys.exit(report(raised))
        if raised is not None:
            raise raised


def _succeeded(raised: BaseException | None) -> bool:
    return raised is None or (isinstance(raised, SystemExit) and raised.code in (None, 0))


def _complain(sentence: str) -> None:
    from epmq_cli.runtime.console import complain  # rich takes a while to import

    with suppress(OSError):
        complain(sentence)


def _reader_left() -> bool:
    """Whether the output is a pipe that nobody reads."""
    poll = select.poll()
    with suppress(OSError, ValueError, AttributeError):
        poll.register(sys.stdout.fileno(), 0)
        return any(flags & select.POLLERR for _, flags in poll.poll(0))
    return False


def _discard_unwritten() -> OSError | None:
    """Flushes the output. If that fails, returns the error and discards the rest, which Python would flush again."""
    try:
        if sys.stdout is not None:  # the parent process may have closed it
            sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return error
    return None
