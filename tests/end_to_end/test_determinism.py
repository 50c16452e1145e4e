"""Oracle: the checkpoint of the same config and seed, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.driver import attempt, files

TENSORS = ("model.safetensors", "heads/heads.safetensors")  # epmq.json contains the options


@pytest.mark.slow
def test_storage_options_do_not_change_the_checkpoint(bert_hub: Path, tmp_path: Path) -> None:
    places = {"plain": (), "again": (), "disk": ("calib.student=disk",), "files": ("calib.memory=1KB",)}
    for name, options in places.items():
        assert attempt(tmp_path / name, bert_hub, "guidance=feature", "eval.stages=[]", *options) == 0
    plain = files(tmp_path / "plain")
    assert files(tmp_path / "again") == plain
    for name in ("disk", "files"):
        assert all(files(tmp_path / name)[file] == plain[file] for file in TENSORS)


@pytest.mark.slow
def test_two_threads_are_deterministic(tmp_path: Path) -> None:
    options = ("device=cpu", "calib.samples=32", "eval.stages=[]")
    for name in ("one", "other"):
        command = [sys.executable, "-m", "epmq_cli", "run", *options, f"out={tmp_path / name}"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert files(tmp_path / "one") == files(tmp_path / "other")
