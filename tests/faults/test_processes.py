"""Oracles: the status of torchrun, and the checkpoint of one process; the test stops a run that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.driver import command, files, mini
from tests.helpers.counts import COMPARED, KILLS, TRIED
from tests.runtime.test_distributed import TORCHRUN

WORKER = str(Path(__file__).with_name("worker.py"))
PATIENCE = 300  # seconds; loaded machines take ten times as long as idle ones


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()
        pytest.fail(f"the run hangs: {process.communicate()[0]}")
    return process.returncode, said


def check_against_one_process(folder: Path, *arguments: str) -> None:
    """Compares the folder `run` of a stopped and continued run with that of an uninterrupted single process."""
    status, said = command(folder, *arguments, "out=one")
    assert status == 0, said
    assert files(folder / "run") == files(folder / "one")
    TRIED[COMPARED] += 1


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_dead_process_ends_the_others_and_the_run_can_continue(
    rank: int, number: int, bert_hub: Path, tmp_path: Path
) -> None:
    arguments = mini(bert_hub, "guidance=feature", "eval.stages=[]", "out=run")
    status, said = wait_for(start(tmp_path, *TORCHRUN, WORKER, str(rank), str(int(number)), "6", *arguments))
    assert status != 0
    TRIED[KILLS] += 1
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert list((tmp_path / "run" / ".resume").glob("*/last/*.safetensors")), said
    status, said = wait_for(start(tmp_path, *TORCHRUN, "-m", "epmq_cli", *arguments))
    assert status == 0, said
    assert "run was interrupted; the run continues after the last finished block" in said
    check_against_one_process(tmp_path, *arguments[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_torchrun_stops_its_processes(number: signal.Signals, bert_hub: Path, tmp_path: Path) -> None:
    arguments = mini(bert_hub, "guidance=feature", "eval.stages=[]", "out=run")
    process = start(tmp_path, *TORCHRUN, WORKER, "0", str(int(signal.SIGSTOP)), "6", *arguments)
    while not list((tmp_path / "run").glob(".resume/*/last/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    status, _ = wait_for(process)
    assert status != 0
    TRIED[KILLS] += 1
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert wait_for(start(tmp_path, *TORCHRUN, "-m", "epmq_cli", *arguments))[0] == 0
    check_against_one_process(tmp_path, *arguments[:-1])
