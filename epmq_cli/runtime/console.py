"""The output of a command: results, messages, errors, and progress bars on a terminal."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from epmq_cli.runtime import distributed

Item = TypeVar("Item")

console = Console(quiet=not distributed.is_main())  # results
messages = Console(stderr=True, quiet=not distributed.is_main())  # progress
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
            line = plain(f"warning: {record.getMessage()}")
            messages.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


log.addHandler(Warnings())


def plain(text: str) -> str:
    """The text on one line, without control characters: names of tensors and files may hold any."""
    return CONTROL.sub("?", text)


def say(message: str) -> None:
    """Prints a one-line message and writes it to run.log."""
    message = plain(message)
    messages.print(message, markup=False, highlight=False, soft_wrap=True)
    log.info(message)


def complain(message: str) -> None:
    """Prints a one-line error from any process."""
    who = "epmq" if distributed.is_main() else f"epmq (process {distributed.rank()})"
    complaints.print(f"{who}: {plain(message)}", style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def bar(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that advances a progress bar of `total` steps by the given number.

    The bar is only shown on a terminal; run.log gets one line for the stage in any case.
    """
    log.info("%s: %d steps", stage, total)
    if not messages.is_terminal or messages.quiet:
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task(stage, total=total)
        yield lambda count: progress.advance(task, count)


def track(items: Sequence[Item], stage: str) -> Iterator[Item]:
    """The items, with a progress bar that advances after each one."""
    with bar(stage, len(items)) as advance:
        for item in items:
            yield item
            advance(1)
