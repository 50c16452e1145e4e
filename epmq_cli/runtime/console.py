"""The output of a command: results, messages and errors."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from epmq_cli.runtime import distributed
from epmq_cli.runtime.verbosity import kind

QUIET = kind() == "quiet" or not distributed.is_main()

console = Console(quiet=QUIET)  # results
messages = Console(stderr=True, quiet=QUIET)  # progress
notices = Console(stderr=True, quiet=not distributed.is_main())  # warnings
complaints = Console(stderr=True)
log = logging.getLogger("epmq")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # the last are surrogates, which cannot be printed


class Warnings(logging.Handler):
    """Prints the warnings that go to run.log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a warning on one line; `complain` prints errors."""
        if record.levelno == logging.WARNING:
            _tell(notices, "warning", plain(record.getMessage()))


log.addHandler(Warnings())


def plain(text: str) -> str:
    """The text on one line, without control characters: names of tensors and files may hold any."""
    return CONTROL.sub("?", text)


@contextmanager
def silent() -> Iterator[None]:
    """Drops messages and warnings: of a check that reads what the run reads again."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def say(message: str) -> None:
    """Prints a one-line message and writes it to run.log."""
    if log.disabled:
        return
    message = plain(message)
    if kind() != "quiet":
        _tell(messages, "message", message)
    log.info(message)


def complain(message: str) -> None:
    """Prints a one-line error from any process."""
    who = "epmq" if distributed.is_main() else f"epmq (process {distributed.rank()})"
    complaints.print(f"{who}: {plain(message)}", style="red", markup=False, highlight=False, soft_wrap=True)


def _tell(screen: Console, event: str, text: str) -> None:
    """Prints a message or warning, as a line of JSON with progress=json."""
    style = None
    if kind() == "json":
        text = json.dumps({"event": event, "text": text})
    elif event == "warning":
        text, style = f"warning: {text}", "yellow"
    screen.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
