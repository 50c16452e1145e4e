"""Runs in processes of their own that are killed at a chosen moment, forked from one that has imported everything."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import epmq_cli.commands.run
import epmq_cli.report.stages
from tests.hubs import run_in

TOUCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def kill() -> None:
    """What a power cut is to a process."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Countdown:
    """Kills the process when this has been called so often; `seen` counts on."""

    until: int
    seen: int = field(default=0)

    def __call__(self) -> None:
        self.seen += 1
        if self.seen == self.until:
            kill()


def at_file(number: int, folder: Path) -> Callable[[], None]:
    """In a process, kills it in front of the so-manieth opening, renaming, making or removing of a file in a folder."""
    step, inside = Countdown(number), str(folder)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in TOUCHED and isinstance(args[0], str | Path) and str(args[0]).startswith(inside):
            step()

    return lambda: sys.addaudithook(hook)


def at_stage(number: int) -> Callable[[], None]:
    """In a process, kills it in front of the so-manieth stage."""
    step, stage = Countdown(number), epmq_cli.report.stages.Stages.stage

    def counted(self: epmq_cli.report.stages.Stages, name: str) -> object:
        step()
        return stage(self, name)

    def hook() -> None:
        epmq_cli.report.stages.Stages.stage = counted  # type: ignore[assignment, method-assign]

    return hook


def forked(body: Callable[[], object], hook: Callable[[], None] = lambda: None, seconds: float | None = None) -> int:
    """What a process that does this ended with: 0, 1 with a traceback where something was raised, or minus the number
    of the signal that killed it; SIGKILL comes after so many seconds if they are given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 on: threads that wait do no harm here
        child = os.fork()
    if child == 0:
        status = 1
        try:
            hook()
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(
    folder: Path, hub: Path, *overrides: str, hook: Callable[[], None] = lambda: None, seconds: float | None = None
) -> int:
    """`forked` for a run on a miniature hub."""
    return forked(lambda: run_in(folder, hub, *overrides), hook, seconds)


def files(folder: Path) -> dict[str, bytes]:
    """The checkpoint of a run."""
    return {path.name: path.read_bytes() for path in sorted((folder / "checkpoint").iterdir())}
