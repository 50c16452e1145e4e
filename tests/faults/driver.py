"""Runs in separate processes that are killed at a chosen moment, forked from one that has imported all modules."""

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
    """A hook that does nothing."""


def kill() -> None:
    """Kills the process without cleanup, like a power cut."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Countdown:
    """Calls `act` on the call with number `until`; `seen` counts all calls."""

    until: int
    act: Callable[[], None]
    seen: int = field(default=0)

    def __call__(self) -> None:
        self.seen += 1
        if self.seen == self.until:
            self.act()


def at_file(number: int, folder: Path, act: Callable[[], None] = kill) -> Callable[[], None]:
    """A hook that kills the process, or calls `act`, before the n-th time that it opens, renames, creates or removes
    a file in a folder."""
    step, inside = Countdown(number, act), (str(folder), os.path.relpath(folder))

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in TOUCHED and isinstance(args[0], str | Path) and str(args[0]).startswith(inside):
            step()

    return lambda: sys.addaudithook(hook)


STAGES = 9  # of a run
PACK = 8  # the number of the stage that writes the checkpoint


def at_stage(number: int, act: Callable[[], None] = kill) -> Callable[[], None]:
    """A hook that kills the process, or calls `act`, before the n-th stage."""
    return on_call(epmq_cli.report.stage_timer.Stages, "stage", number, act)


def forked(
    body: Callable[[], object],
    hook: Callable[[], None] = nothing,
    seconds: float | None = None,
    output: int | None = None,
) -> int:
    """Runs `body` in a forked process. Returns its exit status, 99 with a traceback after an exception, or minus the
    number of the signal that killed it. `seconds`: when to send SIGKILL. `output`: the end of a pipe for its output."""

    def run() -> None:
        if output is not None:
            _redirect_to(output)
        hook()
        body()

    child = _fork(run)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    TRIED[KILLS] += status == -signal.SIGKILL
    TRIED[FAULTS] += hook is not nothing and status not in (0, -signal.SIGKILL)
    return status


def _fork(body: Callable[[], object]) -> int:
    """Runs `body` in a forked process; returns the process id. Its exit status is that of Python, or 99 with a
    traceback after an exception other than SystemExit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since Python 3.12; waiting threads are harmless here
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


def _redirect_to(descriptor: int) -> None:
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    for stream in (console.console, console.messages, console.notices, console.complaints):
        stream.file = sys.stderr


def command(folder: Path, *arguments: str, hook: Callable[[], None] = nothing) -> tuple[int, str]:
    """The exit status and the output of `epmq`, started in a folder."""
    reading, writing = os.pipe()  # holds 64 kB
    status = forked(lambda: _epmq(folder, arguments), hook, output=writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return status, pipe.read()


def run_epmq(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`epmq`, started in a folder, with separate stdout and stderr."""
    return run_ranks(folder, [environment], *arguments)[0]


def run_ranks(
    folder: Path, environments: Sequence[Mapping[str, str]], *arguments: str
) -> list[subprocess.CompletedProcess[str]]:
    """Runs the same command in several processes at once, one per environment."""
    with tempfile.TemporaryDirectory() as outputs:
        places = [Path(outputs, str(number)) for number in range(len(environments))]
        children = [_start(folder, place, arguments, own) for place, own in zip(places, environments, strict=True)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return [
            subprocess.CompletedProcess(arguments, status, *(place.with_suffix(end).read_text() for end in ENDS))
            for status, place in zip(statuses, places, strict=True)
        ]


def torchrun(folder: Path, *arguments: str, count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Does the same as `torchrun --nproc-per-node`, without its imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    return run_ranks(folder, [{**meeting, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)], *arguments)


def _start(folder: Path, place: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Forks `epmq`; returns the process id. Its output goes to files beside `place`."""

    def body() -> None:
        for number, end in enumerate(ENDS, 1):
            os.dup2(os.open(place.with_suffix(end), os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.update(environment)
        console.console.quiet = console.messages.quiet = console.notices.quiet = not distributed.is_main()
        _epmq(folder, arguments)

    return _fork(body)


def _epmq(folder: Path, arguments: Sequence[str]) -> None:
    os.chdir(folder)
    sys.argv = ["epmq", *arguments]
    cli.main()


def on_call(owner: Any, name: str, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """A hook that calls `act` before the n-th call of a function or method."""
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
    """The files of a run's checkpoint."""
    checkpoint = folder / "checkpoint"
    found = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


def mini(hub: Path, *overrides: str) -> tuple[str, ...]:
    """The arguments of a small `epmq run` on a miniature hub."""
    return ("run", "--config-dir", str(hub / "configs"), "suite=mini", *QUICK, "eval.samples=8", *overrides)
