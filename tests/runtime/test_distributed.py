"""Oracle: the run of one process, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from epmq_cli.errors import RunError
from epmq_cli.pipeline.progress import opened
from epmq_cli.runtime import distributed
from tests.conftest import Run
from tests.faults.driver import command, files, mini, torchrun
from tests.helpers.tiers import slow

SMALL = ("device=cpu", "calib.samples=32", "calib.batch_size=8", "eval.stages=[]")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("mix", ["bits=3.5", slow("bits=2.5 quant.sensitivity=divergence")])
def test_two_processes_write_the_checkpoint_of_one(mix: str, clip_hub: Path, tmp_path: Path) -> None:
    options = mini(clip_hub, "guidance=feature", *mix.split())
    two = torchrun(tmp_path, *options, "out=two")
    assert [process.returncode for process in two] == [0, 0], two[0].stderr
    check_same(tmp_path, *options)


@pytest.mark.slow
@pytest.mark.parametrize("refine", ["distill", "blocks"])
def test_refinements_of_two_processes_are_those_of_one_up_to_rounding(
    refine: str, bert_hub: Path, tmp_path: Path
) -> None:
    own = {
        "distill": ("epochs=2", "packed_epochs=2", "packed=scales", "views=2", "batch_size=4"),
        "blocks": ("iterations=4", "every=2", "batch_size=4", "rounding_lr=0"),
    }[refine]
    options = mini(
        bert_hub, "guidance=feature", "calib.views=2", f"refine={refine}", *(f"refine.{text}" for text in own)
    )
    two = torchrun(tmp_path, *options, "out=two")
    assert [process.returncode for process in two] == [0, 0], two[0].stderr
    assert command(tmp_path, *options, "out=one")[0] == 0
    found, wanted = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    if refine == "distill":
        for part, training in wanted["refine"].items():
            [trial], [other] = training["trials"], found["refine"][part]["trials"]
            assert other["losses"] == pytest.approx(trial["losses"], rel=1e-3)
            assert other["best"] == trial["best"]
    for block, other in zip(wanted.get("blocks", []), found.get("blocks", []), strict=True):
        assert other["error"] == pytest.approx(block["error"], rel=1e-3)
        assert other["iteration"] == block["iteration"]


@pytest.mark.slow
def test_torchrun_starts_two_processes_that_write_the_checkpoint_of_one(tmp_path: Path) -> None:
    options = ("run", *SMALL, "bits=3.5")
    two = start(*TORCHRUN, "-m", "epmq_cli", *options, f"out={tmp_path / 'two'}")
    assert two.returncode == 0, two.stderr
    check_same(tmp_path, *options)


def check_same(folder: Path, *options: str) -> None:
    """Checks that two/ contains the checkpoint of the same run in one process."""
    status, said = command(folder, *options, "out=one")
    assert status == 0, said
    assert files(folder / "two") == files(folder / "one")
    layers = [json.loads((folder / name / "metrics.json").read_text())["layers"] for name in ("two", "one")]
    assert [layer["tokens"] for layer in layers[0]] == [layer["tokens"] for layer in layers[1]]
    assert {path.name for path in folder.iterdir()} == {"one", "two"}


@pytest.mark.slow
def test_a_mistake_is_printed_once(tmp_path: Path) -> None:
    result = start(*TORCHRUN, "-m", "epmq_cli", "run", "merge.scale=-1", f"out={tmp_path / 'run'}")
    assert result.returncode != 0
    assert result.stderr.count("merge.scale must be a number in [0, 10], got -1") == 1


def test_the_shares_of_all_processes_cover_all_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    items, rows = [], []
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        items.append(list(distributed.rank_slice(range(8))))
        rows.extend(list(range(10))[distributed.row_range(10)])
    assert items == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert rows == list(range(10))


def test_one_process_needs_no_connection() -> None:
    tensor = torch.arange(4.0)
    assert distributed.all_reduce(tensor) is tensor
    assert distributed.all_gather_rows(tensor, 4) is tensor
    assert distributed.is_main()


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("all_reduce", lambda: distributed.all_reduce(torch.ones(1))),
        ("broadcast_object_list", lambda: distributed.broadcast(1)),
        ("all_gather_object", lambda: distributed.all_gather(1)),
    ],
)
def test_a_lost_process_ends_the_others_with_a_sentence(
    function: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer\nat pair.cc:525")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, function, gone)
    message = r"another process of this run has ended or does not answer \(Connection closed by peer\); start the same"
    with pytest.raises(RunError, match=message):
        call()


@pytest.mark.slow
def test_in_a_sweep_all_processes_skip_jobs_that_are_done(bert_hub: Path, tmp_path: Path) -> None:
    options = (*mini(bert_hub, "guidance=expert"), "-m", f"out={tmp_path / 'sweep'}")
    assert command(tmp_path, *options, "merge=ties")[0] == 0
    swept = torchrun(tmp_path, *options, "merge=ties,average")
    assert [process.returncode for process in swept] == [0, 0], swept[0].stderr
    said = "".join(process.stderr for process in swept)
    assert said.count("merge=ties,suite=mini already contains the results of this job") == 1
    assert command(tmp_path, *options[:-2], "merge=average", f"out={tmp_path / 'one'}")[0] == 0
    assert files(next((tmp_path / "sweep").glob("*merge=average,*"))) == files(tmp_path / "one")


def test_out_of_memory_is_not_reported_as_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "all_reduce", full)
    with pytest.raises(torch.OutOfMemoryError):
        distributed.all_reduce(torch.ones(1))


def test_two_processes_cannot_share_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    distributed.init(torch.device("cuda", 1))  # a single process may use any device
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="2 processes cannot share device=cuda:1; with device=cuda each takes its own"):
        distributed.init(torch.device("cuda", 1))


def test_processes_with_different_configs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_gather", lambda value: [value, "another"])
    with pytest.raises(RunError, match="the processes of this run have different configs; start all of them with"):
        opened(tmp_path, {"config": {"bits": 4}}, "auto")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "torchrun never sets WORLD_SIZE='abc' RANK='0' LOCAL_RANK='0'; start the processes"),
        ({"WORLD_SIZE": "0"}, "torchrun never sets"),
        ({"RANK": ""}, "torchrun never sets"),
        ({"RANK": "x"}, "torchrun never sets"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "torchrun never sets"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "torchrun never sets"),
        ({"WORLD_SIZE": "2"}, "is set without MASTER_ADDR; start the processes with torchrun"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "is set without MASTER_PORT; start"),
    ],
    ids=str,
)
def test_values_that_torchrun_never_sets_are_refused(
    variables: dict[str, str], message: str, epmq_inside: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = epmq_inside("run", "out=x")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert message in result.stderr


def test_a_rank_without_a_world_size_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    distributed.check_environment("merge")
    assert distributed.is_main()
    assert (distributed.rank(), distributed.local_rank()) == (0, 0)


def test_processes_that_cannot_connect_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        RunError, match=r"the processes of this run cannot connect to each other \(.*\); start them with torchrun"
    ):
        distributed.init(torch.device("cpu"))
