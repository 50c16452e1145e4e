"""What a person sees while a command works: progress bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")

console = Console()  # results
messages = Console(stderr=True)  # progress and errors
log = logging.getLogger("epmq")


def say(message: str) -> None:
    """One line of what is going on, for the person and for run.log."""
    messages.print(message, markup=False, highlight=False, soft_wrap=True)
    log.info(message)


def complain(message: str) -> None:
    """One line for the person on what went wrong."""
    messages.print(f"epmq: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def track(items: Sequence[Item], stage: str) -> Iterator[Item]:
    """The items, with a bar named after the stage on a terminal; elsewhere and in run.log one line for the stage."""
    log.info("%s: %d steps", stage, len(items))
    if not messages.is_terminal:
        yield from items
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
        yield from progress.track(items, description=stage)
