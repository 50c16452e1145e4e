"""Oracles: the same model in memory, and the memory of the process as the system reports it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.pipeline.job import make_job
from epmq_cli.runtime import disk_offload, memory
from epmq_cli.runtime.disk_offload import on_disk
from tests.helpers.hubs import config, run_in


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 400)
        self.out = nn.Linear(400, 1000)
        self.out.weight = self.table.weight
        self.register_buffer("ids", torch.arange(300_000))


def test_values_ties_and_types_are_kept(tmp_path: Path) -> None:
    model = Tied().to(torch.bfloat16)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = on_disk(model, tmp_path)
    assert found.out.weight is found.table.weight
    assert found.out.weight.dtype == torch.float32 and found.ids.dtype == torch.int64
    assert all(torch.equal(tensor, wanted[name].to(tensor.dtype)) for name, tensor in found.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_large_tensors_take_no_memory_of_the_process(tmp_path: Path) -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    model = nn.Linear(8192, 8192, bias=False)  # 268 MB
    before = anonymous()
    found = on_disk(model, tmp_path)
    found.weight.data.add_(1)
    memory.give_back()  # runs before this one may have told the C library to keep what is freed
    assert anonymous() < before - 200e6


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelError, match="has no space for the model's weights .No space left on device."):
        on_disk(nn.Linear(1024, 1024), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_writes_the_same_weights_wherever_the_student_is(
    clip_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_offload, "LEAST", 0)
    options = ("guidance=feature", "eval.stages=[merged]")
    memory = run_in(tmp_path / "memory", clip_hub, *options)
    disk = run_in(tmp_path / "disk", clip_hub, *options, "calib.student=disk")
    assert (disk / "model.safetensors").read_bytes() == (memory / "model.safetensors").read_bytes()


def test_the_option_is_checked(clip_hub: Path) -> None:
    from epmq_cli.pipeline import steps as steps

    with pytest.raises(ConfigError, match="calib.student must be one of memory, cpu, disk, got 'tape'"):
        make_job(config(clip_hub, "calib.student=tape"))
