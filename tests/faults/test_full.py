"""Oracles: one sentence, no results, and the checkpoint of the same run once there is space again."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import epmq_cli.calibrate.activations.store
import epmq_cli.calibrate.progress_file
import epmq_cli.checkpoint.write
import epmq_cli.pipeline.progress
import epmq_cli.report.metrics_json
import epmq_cli.runtime.disk_offload
from tests.faults.driver import attempt, command, files, mini, on_call
from tests.helpers.tiers import only

SMALL = ("guidance=feature", "calib.memory=1KB", "calib.student=disk", "suite.tasks.first.max_length=16")
WRITES: dict[str, tuple[Any, str, int]] = {
    "first state": (epmq_cli.pipeline.progress, "write_text", 1),
    "scores": (epmq_cli.pipeline.progress, "write_text", 3),
    "what experts give": (epmq_cli.pipeline.progress, "write_tensors", 1),
    "first section": (epmq_cli.calibrate.progress_file, "write_file", 3),
    "last section": (epmq_cli.calibrate.progress_file, "write_file", 6),
    "activations": (epmq_cli.calibrate.activations.store, "_bytes", 1),
    "later activations": (epmq_cli.calibrate.activations.store, "_bytes", 20),
    "checkpoint": (epmq_cli.checkpoint.write, "write_model", 1),
    "heads": (safetensors.torch, "save_file", 1),
    "manifest": (epmq_cli.checkpoint.write, "write_manifest", 1),
    "metrics": (epmq_cli.report.metrics_json, "write_text", 1),
}


def fill() -> None:
    """Limits every file to 16 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))


def one_sentence(said: str) -> bool:
    """Whether the last line is an error of epmq without a traceback."""
    return said.splitlines()[-1].startswith("epmq: ") and "Traceback" not in said


@pytest.mark.parametrize("write", only(("checkpoint",), WRITES))
def test_a_full_disk_ends_a_run_that_can_continue(write: str, bert_hub: Path, tmp_path: Path) -> None:
    owner, name, number = WRITES[write]
    arguments, run = mini(bert_hub, "guidance=feature", "calib.memory=1KB", "out=run"), tmp_path / "run"
    status, said = command(tmp_path, *arguments, hook=on_call(owner, name, number, fill))
    assert (status, one_sentence(said)) == (1, True), said
    assert not (run / "metrics.json").exists()
    assert (run / "checkpoint").exists() is (write == "metrics")
    assert not [path for path in run.rglob(".*") if path.name.endswith(".partial") or "activations" in path.name]
    assert command(tmp_path, *arguments)[0] == 0
    assert attempt(tmp_path / "whole", bert_hub, "guidance=feature", "calib.memory=1KB") == 0
    assert files(run)["model.safetensors"] == files(tmp_path / "whole")["model.safetensors"]


def mount(folder: Path, options: str) -> None:
    """Mounts a tmpfs on a folder, or remounts it with other options."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 60 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    mount(folder, "size=60k")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_small_disk(bert_hub: Path, disk: Path, tmp_path: Path) -> None:
    arguments = mini(bert_hub, "guidance=feature", f"out={disk}/run")
    for size in (60, 110):
        mount(disk, f"remount,size={size}k")
        status, said = command(tmp_path, *arguments)
        assert (status, one_sentence(said)) == (1, True), said
        assert not (disk / "run" / "metrics.json").exists()
    mount(disk, "remount,size=10m")
    assert command(tmp_path, *arguments)[0] == 0
    assert attempt(tmp_path / "whole", bert_hub, "guidance=feature") == 0
    assert files(disk / "run")["model.safetensors"] == files(tmp_path / "whole")["model.safetensors"]


def test_a_disk_that_cannot_be_written(bert_hub: Path, disk: Path, tmp_path: Path) -> None:
    mount(disk, "remount,ro")
    status, said = command(tmp_path, *mini(bert_hub, f"out={disk}/run"))
    assert (status, one_sentence(said)) == (1, True), said
    assert "Read-only file system" in said


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_file_where_the_folder_should_be(out: str, bert_hub: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    status, said = command(tmp_path, *mini(bert_hub, f"out={out}"))
    assert (status, one_sentence(said)) == (1, True), said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_log_that_cannot_be_written(bert_hub: Path, tmp_path: Path) -> None:
    """Hydra itself would show a traceback."""
    (tmp_path / "run" / "run.log").mkdir(parents=True)
    status, said = command(tmp_path, *mini(bert_hub, "out=run"))
    assert (status, one_sentence(said)) == (1, True), said
    assert "run.log cannot be used (Is a directory)" in said
