"""How the process of a command ends where nothing nearer to it says so: quietly, or with a sentence and a status."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from epmq_cli.errors import EpmqError
from epmq_cli.runtime.signals import STATUS, answered, seen

UNREAD = 141
"""What shells say of a tool that was ended by SIGPIPE, as most are whose reader is gone."""


@contextmanager
def ending(debug: bool) -> Iterator[None]:
    """Around a command. What it printed has been written when the block is over.

    A signal ends it with the signal's status, whatever its clean-up raises afterwards; a closed pipe ends it quietly.
    `debug`: with a traceback in place of a sentence where it is none of these.
    """
    with answered():
        try:
            try:
                yield
            except SystemExit as stopped:
                _flush(said=stopped.code not in (None, 0))
                raise
            _flush()
        except BaseException as raised:
            if (number := seen()) is not None:
                _drop()
                sys.exit(STATUS[number] if isinstance(raised, SystemExit) else _interrupted(number))
            if isinstance(raised, BrokenPipeError):
                _drop()
                sys.exit(UNREAD)
            if not debug and isinstance(raised, (EpmqError, OSError)):
                _drop()
                sys.exit(f"epmq: {_sentence(raised)}")
            raise


def _interrupted(number: int) -> int:
    with suppress(OSError):
        print("epmq: interrupted", file=sys.stderr)
    return STATUS[number]


def _sentence(error: EpmqError | OSError) -> str:
    if isinstance(error, EpmqError):
        return str(error)
    return f"{error.filename or 'what this prints'} cannot be read or written ({error.strerror or error})"


def _flush(said: bool = False) -> None:
    """Writes what was printed; `said`: of a command that has said already why it ends no second sentence is wanted."""
    if sys.stdout is None:  # closed by who started the process
        return
    try:
        sys.stdout.flush()
    except OSError:
        if not said:
            raise
        _drop()


def _drop() -> None:
    """Python writes what is left once more at its exit, and complains: from here on that goes nowhere."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
