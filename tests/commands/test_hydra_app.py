"""Oracle: the contract of errors.py for every exception: a sentence, a status, and a traceback on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from epmq_cli.errors import ConfigError, DataError
from tests.conftest import Run
from tests.helpers.tiers import only, slow

OPTIONS = ("run", "out=here", "eval.stages=[]")
DEFECT = (
    "epmq: this is a bug in epmq, not in your input (ZeroDivisionError: division by zero); run the same "
    "command with --debug and report its output\n"
)
Broken = Callable[[BaseException], None]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Makes every run raise this error where it would open its models."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def set_up(error: BaseException) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("epmq_cli.pipeline.steps.open_models", fail)

    return set_up


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DataError("no data"), 1, "epmq: no data\n"),
        slow((DataError("two\nlines\tand \x1b[31mcolour"), 1, "epmq: two; lines?and ?[31mcolour\n")),
        (
            OSError(28, "No space left on device", "a/b"),
            1,
            "epmq: a/b cannot be written or read (No space left on device); free some space there, or choose another "
            "out\n",
        ),
        slow(
            (
                PermissionError(13, "Permission denied", "a/b"),
                1,
                "epmq: a/b may not be read or written (Permission denied); change its permissions, or choose another\n",
            )
        ),
        slow((OSError(40, "Too many levels", "a/b"), 1, "epmq: a/b cannot be used (Too many levels)\n")),
        slow((OSError("odd"), 1, "epmq: odd\n")),
        (
            MemoryError(),
            1,
            "epmq: there is not enough memory; lower calib.memory, calib.batch_size or eval.batch_size\n",
        ),
        slow(
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried"),
                1,
                "epmq: the device does not have enough memory for the model; use calib.student=cpu or a larger device",
            )
        ),
        slow(
            (
                RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
                1,
                "epmq: there is not enough memory; lower ",
            )
        ),
        (ZeroDivisionError("division by zero"), 70, DEFECT),
        slow(
            (
                KeyError(),
                70,
                "epmq: this is a bug in epmq, not in your input (KeyError); run the same command with --debug",
            )
        ),
        (KeyboardInterrupt(), 130, "epmq: interrupted; start the same command again to continue after the last"),
    ],
    ids=repr,
)
def test_every_exception_is_reported_in_one_sentence(
    error: BaseException, status: int, message: str, broken: Broken, epmq_inside: Run, tmp_path: Path
) -> None:
    broken(error)
    result = epmq_inside(*OPTIONS, "device=cpu")
    first, rest = result.stderr.split("\n", 1)
    assert (result.returncode, first) == (status, "5 experts, on cpu, results go to here")
    assert rest.startswith(message)
    assert rest.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "here" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("--debug", ZeroDivisionError("division by zero")),
        slow(("--debug", DataError("no data"))),
        slow(("HYDRA_FULL_ERROR", ZeroDivisionError("division by zero"))),
        ("HYDRA_FULL_ERROR", DataError("no data")),
    ],
    ids=repr,
)
def test_tracebacks_are_shown_on_request(
    error: Exception, how: str, broken: Broken, epmq_inside: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(error)
    monkeypatch.setenv("HYDRA_FULL_ERROR", str(int(how == "HYDRA_FULL_ERROR")))
    with pytest.raises(type(error)) as raised:
        epmq_inside(*OPTIONS, *([how] if how == "--debug" else []))
    assert raised.traceback[-1].name == "fail"


def test_the_log_has_tracebacks_of_defects_and_messages_of_user_errors(
    broken: Broken, epmq_inside: Run, tmp_path: Path
) -> None:
    broken(ZeroDivisionError("division by zero"))
    epmq_inside(*OPTIONS)
    log = (tmp_path / "here" / "run.log").read_text()
    assert "ERROR epmq: the job ends here\nTraceback (most recent call last):" in log
    assert "ZeroDivisionError: division by zero" in log
    broken(DataError("no data"))
    epmq_inside(*OPTIONS)
    later = (tmp_path / "here" / "run.log").read_text().removeprefix(log)
    assert later.endswith("ERROR epmq: no data\n")
    assert "Traceback" not in later


def test_a_sweep_continues_after_a_failed_job(
    epmq_inside: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def fail(job: object, folder: Path) -> None:
        started.append(folder.name)
        raise ConfigError("not this one")

    monkeypatch.setattr("epmq_cli.pipeline.steps.open_models", fail)
    result = epmq_inside("run", "-m", "bits=3,4", "out=here")
    assert started == ["bits=3", "bits=4"]
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, "epmq: not this one")


@pytest.mark.parametrize("command", only(("merge",), ["run", "merge", "eval", "verify"]))
def test_every_command_has_the_debug_option(command: str, epmq_inside: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing checkpoint is a user error of verify and eval; its traceback is shown on request."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert "--debug" in epmq_inside(command, "--help").stdout
    given = "nowhere" if command in ("eval", "verify") else "suite.base=nowhere.pt"
    assert epmq_inside(command, given).returncode == 1
    with pytest.raises(Exception, match="nowhere"):
        epmq_inside(command, given, "--debug")


def test_a_log_that_cannot_be_written_is_a_user_error(epmq_inside: Run, tmp_path: Path) -> None:
    (tmp_path / "here" / "run.log").mkdir(parents=True)
    result = epmq_inside(*OPTIONS)
    assert result.returncode == 1
    assert result.stderr == f"epmq: {tmp_path}/here/run.log cannot be used (Is a directory)\n"
