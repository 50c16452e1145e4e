"""Runs in processes of their own that are killed at a chosen moment, forked from one that has imported everything."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import epmq_cli.commands.run
import epmq_cli.report.stage_timer
from epmq_cli import cli
from epmq_cli.runtime import console, distributed
from tests.helpers.counts import FAULTS, KILLS, TRIED
from tests.helpers.hubs import QUICK, run_in

TOUCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
ENDS = (".out", ".err")


def nothing() -> None:
    """No hook."""


def kill() -> None:
    """What a power cut is to a process."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Countdown:
    """Does something when this has been called so often; `seen` counts on."""

    until: int
    act: Callable[[], None]
    seen: int = field(default=0)

    def __call__(self) -> None:
        self.seen += 1
        if self.seen == self.until:
            self.act()


def at_file(number: int, folder: Path, act: Callable[[], None] = kill) -> Callable[[], None]:
    """In a process, kills it, or does something else, in front of the so-manieth opening, renaming, making or removing
    of a file in a folder."""
    step, inside = Countdown(number, act), (str(folder), os.path.relpath(folder))

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in TOUCHED and isinstance(args[0], str | Path) and str(args[0]).startswith(inside):
            step()

    return lambda: sys.addaudithook(hook)


def at_stage(number: int, act: Callable[[], None] = kill) -> Callable[[], None]:
    """In a process, kills it, or does something else, in front of the so-manieth stage."""
    return on_call(epmq_cli.report.stage_timer.Stages, "stage", number, act)


def forked(
    body: Callable[[], object],
    hook: Callable[[], None] = nothing,
    seconds: float | None = None,
    output: int | None = None,
) -> int:
    """What a process that does this ended with: its status, 99 with a traceback where something was raised, or minus
    the number of the signal that killed it; SIGKILL comes after so many seconds if they are given. `output`: the
    end of a pipe for what it says."""

    def hooked() -> None:
        if output is not None:
            _say_to(output)
        hook()
        body()

    child = _fork(hooked)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    TRIED[KILLS] += status == -signal.SIGKILL
    TRIED[FAULTS] += hook is not nothing and status not in (0, -signal.SIGKILL)
    return status


def _fork(body: Callable[[], object]) -> int:
    """The number of a process that does this. Its status is that of Python, or 99 with a traceback where something else
    than SystemExit was raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 on: threads that wait do no harm here
        child = os.fork()
    if child:
        return child
    status = 99
    try:
        body()
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _say_to(descriptor: int) -> None:
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    for stream in (console.console, console.messages, console.complaints):
        stream.file = sys.stderr


def command(folder: Path, *arguments: str, hook: Callable[[], None] = nothing) -> tuple[int, str]:
    """The status of `epmq` as started in a folder, and what it says."""
    reading, writing = os.pipe()  # which holds 64 kB
    status = forked(lambda: _epmq(folder, arguments), hook, output=writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return status, pipe.read()


def separate(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`epmq` as started in a folder, with output and errors apart."""
    return ranks(folder, [environment], *arguments)[0]


def ranks(
    folder: Path, environments: Sequence[Mapping[str, str]], *arguments: str
) -> list[subprocess.CompletedProcess[str]]:
    """The same command in several processes at once, one for each environment."""
    with tempfile.TemporaryDirectory() as outputs:
        places = [Path(outputs, str(number)) for number in range(len(environments))]
        children = [_start(folder, place, arguments, own) for place, own in zip(places, environments, strict=True)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return [
            subprocess.CompletedProcess(arguments, status, *(place.with_suffix(end).read_text() for end in ENDS))
            for status, place in zip(statuses, places, strict=True)
        ]


def torchrun(folder: Path, *arguments: str, count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """What `torchrun --nproc-per-node` starts, without its own imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    return ranks(folder, [{**meeting, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)], *arguments)


def _start(folder: Path, place: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Forks `epmq`; the number of the process. Its output goes to files beside `place`."""

    def body() -> None:
        for number, end in enumerate(ENDS, 1):
            os.dup2(os.open(place.with_suffix(end), os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.update(environment)
        console.console.quiet = console.messages.quiet = not distributed.is_main()
        _epmq(folder, arguments)

    return _fork(body)


def _epmq(folder: Path, arguments: Sequence[str]) -> None:
    os.chdir(folder)
    sys.argv = ["epmq", *arguments]
    cli.main()


def on_call(owner: Any, name: str, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """In a process, does something when a function or method is called the so-manieth time, before it."""
    calls, real = itertools.count(1), getattr(owner, name)

    def wrapper(*args: Any, **options: Any) -> Any:
        if next(calls) == number:
            act()
        return real(*args, **options)

    return lambda: setattr(owner, name, wrapper)


def attempt(
    folder: Path, hub: Path, *overrides: str, hook: Callable[[], None] = nothing, seconds: float | None = None
) -> int:
    """`forked` for a run on a miniature hub."""
    return forked(lambda: run_in(folder, hub, *overrides), hook, seconds)


def files(folder: Path) -> dict[str, bytes]:
    """The checkpoint of a run."""
    checkpoint = folder / "checkpoint"
    found = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


def mini(hub: Path, *overrides: str) -> tuple[str, ...]:
    """The arguments of a small `epmq run` on a miniature hub."""
    return ("run", "--config-dir", str(hub / "configs"), "suite=mini", *QUICK, "eval.samples=8", *overrides)
