"""Oracles: what other Unix tools do on signals, closed pipes and full disks: their statuses, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import epmq_cli.pipeline.steps
import epmq_cli.store.manifest
from epmq_cli import cli
from epmq_cli.cli import INTERRUPTED
from epmq_cli.runtime.signals import STATUS
from tests.conftest import Run
from tests.faults.driver import command, on_call
from tests.helpers.tiers import every, first

PRINTING = ("list", "--help", "run --help", "verify --help", "--version")
SIGNALS = sorted(STATUS)


def send(number: int) -> None:
    """Sends this process a signal and waits for it."""
    os.kill(os.getpid(), number)
    time.sleep(10)


def twice(number: int) -> None:
    """Receives more signals while it cleans up after the first."""
    try:
        send(number)
    finally:
        for other in SIGNALS:
            os.kill(os.getpid(), other)
            time.sleep(0.01)


def replace_exception(number: int) -> None:
    """Stands for a library that raises another exception when it is interrupted."""
    try:
        send(number)
    except KeyboardInterrupt:
        raise AttributeError("'NoneType' object has no attribute '_invalidate_flags_cache'") from None


def swallow_exception(number: int) -> None:
    """Stands for a library that swallows the exception; `launch` raises it again."""
    try:
        send(number)
    except KeyboardInterrupt:
        return


@pytest.mark.parametrize("act", first(1, [twice, send, replace_exception]))
@pytest.mark.parametrize("number", first(1, SIGNALS))
def test_a_job_ends_with_the_status_of_its_first_signal(
    act: Callable[[int], None], number: int, tmp_path: Path
) -> None:
    hook = on_call(epmq_cli.pipeline.steps, "open_models", 1, lambda: act(number))
    status, said = command(tmp_path, "run", "out=x", "eval.stages=[]", hook=hook)
    assert (status, said.splitlines()[1:]) == (STATUS[number], [f"epmq: {INTERRUPTED['run']}"])


@pytest.mark.parametrize("arguments", ["list", "run", "verify x", "run --help"])
@pytest.mark.parametrize("act", [send, twice, replace_exception])
def test_a_signal_during_an_import_ends_the_command(arguments: str, act: Callable[[int], None], tmp_path: Path) -> None:
    hook = on_call(cli.importlib, "import_module", 1, lambda: act(signal.SIGINT))
    said = INTERRUPTED.get(arguments.split()[0], "interrupted")
    assert command(tmp_path, *arguments.split(), hook=hook) == (130, f"epmq: {said}\n")


def test_a_signal_that_an_import_swallows_ends_the_command_later(tmp_path: Path) -> None:
    hook = on_call(cli.importlib, "import_module", 1, lambda: swallow_exception(signal.SIGTERM))
    assert command(tmp_path, "merge", hook=hook) == (143, f"epmq: {INTERRUPTED['merge']}\n")


def test_verify_has_its_own_sentence(tmp_path: Path) -> None:
    hook = on_call(epmq_cli.store.manifest, "file_problems", 1, lambda: send(signal.SIGINT))
    assert command(tmp_path, "verify", str(tmp_path), hook=hook) == (130, f"epmq: {INTERRUPTED['verify']}\n")


def test_a_signal_while_python_exits_shows_no_traceback() -> None:
    code = (
        "import atexit, os, sys; from epmq_cli.cli import main; sys.argv = ['epmq', '--version']; "
        "atexit.register(os.kill, os.getpid(), 2); main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


def printing(arguments: str, output: int | None) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "epmq_cli", *arguments.split()]
    ended = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, env=environment, check=False)
    return ended.returncode, ended.stderr.decode()


@pytest.mark.parametrize("arguments", every(2, [*PRINTING, "run --cfg job"]))
def test_a_closed_pipe_ends_it_quietly(arguments: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert printing(arguments, writing) == (141, "")
    os.close(writing)


@pytest.mark.parametrize("arguments", every(2, PRINTING))
def test_a_full_disk_is_reported_in_a_sentence(arguments: str) -> None:
    with Path("/dev/full").open("w") as full:
        found = printing(arguments, full.fileno())
    assert found == (1, "epmq: the output cannot be written (No space left on device)\n")


def test_list_names_the_config_that_it_cannot_read(
    epmq_inside: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine" / "suite" / "birds.yaml"
    path.parent.mkdir(parents=True)
    arguments, said = ("list", "--config-dir", "mine"), "epmq: a config file cannot be read: mine/suite/birds.yaml"
    path.write_bytes(b"# epmq run\n# V\xf6gel\n")
    assert epmq_inside(*arguments).stderr == f"{said} is not UTF-8 text; save it in UTF-8\n"
    path.unlink()
    os.mkfifo(path)
    assert epmq_inside(*arguments).stderr == f"{said} is not a file; remove it\n"
    path.unlink()
    path.write_text("")

    real = Path.read_text

    def refused(self: Path, encoding: str | None = None) -> str:
        if self.name == path.name:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, encoding)

    monkeypatch.setattr(Path, "read_text", refused)
    assert epmq_inside(*arguments).stderr == f"{said} (Permission denied); repair or remove it\n"
