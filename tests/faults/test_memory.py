"""Oracle: the checkpoint and the scores of the same run on a device with enough memory, byte for byte."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import epmq_cli.pipeline.calibration as guide
from epmq_cli.calibrate.activations.hidden_state import HiddenState
from epmq_cli.calibrate.activations.pausable_forward import PausableForward
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.progress import WalkProgress
from epmq_cli.calibrate.reference_weights import ReferenceWeights
from epmq_cli.commands.eval import evaluate
from epmq_cli.errors import RunError
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job
from epmq_cli.runtime import distributed
from tests.faults.device import CALIBRATION, SCORES, SCORING, Device
from tests.faults.driver import at_file, attempt, mini
from tests.faults.short import OPTIONS, Undisturbed, check_place, check_same, hub_of, measured
from tests.faults.test_processes import start, wait_for
from tests.helpers.hubs import config, eval_config, run_in
from tests.helpers.tiers import first
from tests.runtime.test_distributed import TORCHRUN


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "t5", "clip", "llama"])
def test_a_device_that_fits_one_sample(
    kind: str,
    undisturbed: Undisturbed,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub, device = hub_of(kind, request, tmp_path), Device(1)
    whole = undisturbed(hub)
    capsys.readouterr()
    with device.during(*CALIBRATION, *SCORING):
        run_in(tmp_path / "run", hub, *OPTIONS)
    events, said = check_same(tmp_path / "run", whole), capsys.readouterr()
    assert events["batches_halved"] == 3
    assert device.refused == events["batches_halved"] + events["eval_batches_halved"] >= 5
    for more, less in ((8, 4), (4, 2), (2, 1)):
        line = f"there is not enough memory for calibration with {more} samples at a time; epmq retries with {less}\n"
        assert said.err.count(line) == 1
    assert said.err.count("there is not enough memory for scoring with ") == events["eval_batches_halved"]
    assert f"halved in calibration 3 times and in scoring {events['eval_batches_halved']} times\n" in said.out


@pytest.mark.parametrize("place", first(1, ["the teachers walk", "heads are solved"]))
def test_the_micro_batch_is_halved_in_every_step(
    place: str, undisturbed: Undisturbed, bert_hub: Path, tmp_path: Path
) -> None:
    check_place(place, 3, bert_hub, tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_finished_blocks_are_not_recomputed(undisturbed: Undisturbed, bert_hub: Path, tmp_path: Path) -> None:
    written: list[str] = []
    real = WalkProgress.write

    def write(self: WalkProgress, entry: str, *given: Any) -> None:
        written.append(entry)
        real(self, entry, *given)

    whole = undisturbed(bert_hub)
    device = Device(2, after=130)
    with mock.patch.object(WalkProgress, "write", write), device.during((guide, "calibrate")):
        run_in(tmp_path / "run", bert_hub, *OPTIONS)
    assert check_same(tmp_path / "run", whole)["batches_halved"] == 2
    assert written == ["0000-stem", "0000", "0001", "0002"]


@pytest.mark.slow
def test_memory_of_a_failed_walk_is_freed_before_it_restarts(bert_hub: Path, tmp_path: Path) -> None:
    left: list[int] = []
    real = ReferenceWeights.restore

    def restore(self: ReferenceWeights, model: nn.Module) -> None:
        left.append(sum(type(thing) in (HiddenState, PausableForward, ActivationStore) for thing in gc.get_objects()))
        real(self, model)

    with mock.patch.object(ReferenceWeights, "restore", restore), Device(1, after=130).during((guide, "calibrate")):
        run_in(tmp_path / "run", bert_hub, "guidance=feature", "eval.stages=[]")
    assert left == [0, 0, 0]


@pytest.mark.slow
def test_a_run_that_fits_no_sample_ends_in_a_sentence_and_can_continue(
    undisturbed: Undisturbed, bert_hub: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with Device(0, after=60).during((guide, "calibrate")), pytest.raises(RunError) as raised:
        run_in(run, bert_hub, *OPTIONS)
    assert str(raised.value) == (
        "there is not enough memory for calibration, even with one sample at a time; lower max_length of the suite's "
        "tasks or calib.memory, use a device with more memory, or calib.student=disk"
    )
    assert not (run / "checkpoint").exists()
    with (
        Device(0).during(SCORES),
        pytest.raises(RunError, match="not enough memory for scoring, even with one"),
    ):
        run_in(run, bert_hub, *OPTIONS)
    run_in(run, bert_hub, *OPTIONS)
    events = check_same(run, undisturbed(bert_hub))
    assert (events["batches_halved"], events["eval_batches_halved"]) == (3, 3)  # those of the earlier processes
    assert measured(run)["resumed"] == 2


def kill_between_halvings(
    whole: Path, folder: Path, hub: Path, number: int, capfd: pytest.CaptureFixture[str], *options: str
) -> tuple[bool, bool]:
    """Kills a run with little memory before its n-th file operation and continues it, with little memory from the
    start. Returns whether the first process halved its micro-batch before it was killed, and whether the second did."""
    run = folder / str(number)

    def short(after: int, kills: bool) -> Callable[[], None]:
        def hook() -> None:
            Device(1, after).enter((guide, "calibrate"))
            if kills:
                at_file(number, run)()

        return hook

    capfd.readouterr()
    status = attempt(run, hub, *OPTIONS, *options, hook=short(100, True))
    first = "not enough memory for calibration" in capfd.readouterr().err and status == -signal.SIGKILL
    if not (run / "metrics.json").exists():
        assert attempt(run, hub, *OPTIONS, *options, hook=short(0, False)) == 0
    check_same(run, whole)
    return first, "not enough memory for calibration" in capfd.readouterr().err


@pytest.mark.slow
def test_killed_between_halvings(
    undisturbed: Undisturbed, bert_hub: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert kill_between_halvings(undisturbed(bert_hub), tmp_path, bert_hub, 52, capfd) == (True, True)


@pytest.mark.slow
def test_killed_between_halvings_at_any_file(
    undisturbed: Undisturbed, bert_hub: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("guidance.sweeps=2", "bits=3.5")
    whole = undisturbed(bert_hub, *options)
    found = [kill_between_halvings(whole, tmp_path, bert_hub, n, capfd, *options) for n in range(24, 120, 6)]
    print(found)
    assert sum(first and second for first, second in found) >= 4


def test_epmq_eval_halves_its_batches_too(bert_hub: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path, bert_hub, "eval.samples=8")
    cfg = eval_config(checkpoint, "eval.samples=8")
    (tmp_path / "again").mkdir()
    with Device(3).during(SCORES):
        evaluate(cfg, tmp_path / "again", [])
    found, wanted = measured(tmp_path / "again"), measured(tmp_path)
    assert found["events"] == {"eval_batches_halved": 2}
    for task, scores in wanted["scores"]["tasks"].items():
        assert found["scores"]["tasks"][task]["quantized"] == scores["quantized"]


def test_one_of_several_processes_never_halves_alone(bert_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(config(bert_hub))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(torch.OutOfMemoryError):
        RunContext.of(job).micro.run(
            lambda samples: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
        )


@pytest.mark.slow
def test_out_of_memory_in_one_process_ends_all_with_a_sentence(bert_hub: Path, tmp_path: Path) -> None:
    script = tmp_path / "short.py"
    script.write_text(
        "import sys\n"
        "import epmq_cli.pipeline.calibration as guide\n"
        "from epmq_cli import cli\n"
        "from epmq_cli.runtime import distributed\n"
        "from tests.faults.device import Device\n"
        "if distributed.rank() == 1:\n"
        "    Device(2, after=40).enter((guide, 'calibrate'))\n"
        "sys.argv[0] = 'epmq'\n"
        "cli.main()\n"
    )
    arguments = mini(bert_hub, "guidance=feature", "eval.stages=[]", "out=run")
    status, said = wait_for(start(tmp_path, *TORCHRUN, str(script), *arguments))
    assert status != 0
    assert "the device does not have enough memory for calib.batch_size=8; lower it, because a run of several " in said
    status, said = wait_for(start(tmp_path, sys.executable, "-m", "epmq_cli", *arguments[:-1], "out=one"))
    assert status == 0, said
