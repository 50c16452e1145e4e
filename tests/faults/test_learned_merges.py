"""Oracles: for several processes, the merge of one, up to rounding; for runs killed in their merge, the checkpoint
of an undisturbed run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from epmq_cli.calibrate.merge_data import ExpertMeasurements
from tests.faults.driver import attempt, command, files, kill, mini, on_call, torchrun

PLAIN = ("guidance=merged", "quant=none", "eval.stages=[]")
LEARNED = ("merge.steps=6", "merge.lr=0.02", "merge.batch_size=3")
METHODS = {
    "adamerging": ("merge=adamerging", *LEARNED),
    "soft_merging": ("merge=soft_merging", *LEARNED),
    "regmean with fallback": ("merge=regmean", "merge.fallback=true", "calib.batch_size=3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_two_processes_merge_as_one(options: tuple[str, ...], bert_hub: Path, tmp_path: Path) -> None:
    arguments = mini(bert_hub, *PLAIN, *options)
    two = torchrun(tmp_path, *arguments, "out=two")
    assert [process.returncode for process in two] == [0, 0], two[0].stderr
    status, said = command(tmp_path, *arguments, "out=one")
    assert status == 0, said
    found, wanted = (load(files(tmp_path / name)["model.safetensors"]) for name in ("two", "one"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamerging", "soft_merging"])
def test_killed_while_it_learns(name: str, bert_hub: Path, tmp_path: Path) -> None:
    options, run, whole = (*PLAIN, *METHODS[name]), tmp_path / "run", tmp_path / "whole"
    for number in (1, 7):
        hook = on_call(ExpertMeasurements, "gradients", number, kill)
        assert attempt(run, bert_hub, *options, hook=hook) == -signal.SIGKILL
        assert not {path.name for path in run.iterdir()} & {"checkpoint", "metrics.json"}
    assert attempt(run, bert_hub, *options) == 0
    assert attempt(whole, bert_hub, *options) == 0
    assert files(run) == files(whole)
