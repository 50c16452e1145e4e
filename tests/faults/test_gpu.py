"""Oracles: the undisturbed run on the same GPU, byte for byte, or up to rounding if the fault changes the shapes of
products."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch

from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.errors import RunError
from tests.end_to_end.test_gpu import check_near, check_place
from tests.faults.device import CALIBRATION, SCORING, Device
from tests.faults.driver import files, mini
from tests.faults.short import OPTIONS, Undisturbed, measured
from tests.faults.test_processes import WORKER, start, wait_for
from tests.helpers.counts import COMPARED, KILLS, TRIED
from tests.helpers.gpu import DEVICE, OWN
from tests.helpers.hubs import Scene, run_in
from tests.runtime.test_distributed import TORCHRUN

pytestmark = pytest.mark.gpu

MEGABYTE = 1 << 20
SAMPLES = 8  # the number of scored samples in OPTIONS and `mini`


class Full(Device):
    """Raises the error of the real device."""

    def fail(self) -> None:
        """Allocates more memory than any device has."""
        torch.empty(1 << 60, dtype=torch.uint8, device=DEVICE)


def test_the_micro_batch_is_halved_if_the_device_is_full(
    undisturbed: Undisturbed, bert_hub: Path, tmp_path: Path
) -> None:
    device = Full(1)
    with device.during(*CALIBRATION, *SCORING):
        run_in(tmp_path, bert_hub, *OPTIONS, OWN)
    events = measured(tmp_path)["events"]
    assert events["batches_halved"] == 3
    assert device.refused == events["batches_halved"] + events["eval_batches_halved"] >= 5
    check_place(tmp_path)
    check_near(tmp_path, undisturbed(bert_hub, OWN), Scene(bert_hub, *OPTIONS), SAMPLES)


def test_a_run_that_fits_no_sample_ends_in_a_sentence_and_can_continue(
    undisturbed: Undisturbed, bert_hub: Path, tmp_path: Path
) -> None:
    with (
        Full(0, after=60).during(*CALIBRATION),
        pytest.raises(RunError, match="not enough memory for calibration, even with one"),
    ):
        run_in(tmp_path, bert_hub, *OPTIONS, OWN)
    run_in(tmp_path, bert_hub, *OPTIONS, OWN)
    assert measured(tmp_path)["resumed"] == 1
    assert files(tmp_path) == files(undisturbed(bert_hub, OWN))


def test_the_micro_batch_fits_the_memory_limit_of_the_device() -> None:
    """Closed form: at 8 MB a sample and 40 MB of memory, 4 samples fit, 8 and 16 do not."""
    batch, micro = {"x": torch.arange(16.0, device=DEVICE)[:, None]}, MicroBatcher(16, "tests", "")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 40 * MEGABYTE) / total)
    try:
        found = micro.rows(lambda part: part["x"].repeat(1, 2 * MEGABYTE).sum(1), batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.tolist() == [2.0 * MEGABYTE * number for number in range(16)]
    assert (micro.samples, micro.halved) == (4, 2)


def test_a_killed_run_resumes_to_the_same_bytes(bert_hub: Path, tmp_path: Path) -> None:
    """Killed in the first block and, after continuing, in the second; always in a new process, because CUDA does not
    survive a fork."""
    arguments = mini(bert_hub, "guidance=feature", "guidance.heads=always", OWN)
    for call, entries in ((6, ["0000-stem"]), (10, ["0000", "0000-stem"])):
        worker = (sys.executable, WORKER, "0", str(int(signal.SIGKILL)), str(call))
        status, said = wait_for(start(tmp_path, *worker, *arguments, "out=run"))
        assert status == -signal.SIGKILL, said
        TRIED[KILLS] += 1
        assert sorted(path.stem for path in (tmp_path / "run").glob(".resume/*/last/*.safetensors")) == entries
    for out in ("run", "whole"):
        status, said = wait_for(start(tmp_path, sys.executable, "-m", "epmq_cli", *arguments, f"out={out}"))
        assert status == 0, said
        assert ("continues after the last finished block" in said) == (out == "run")
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    run, whole = (measured(tmp_path / out) for out in ("run", "whole"))
    assert all(run[name] == whole[name] for name in ("layers", "scores", "guidance", "events"))
    assert (run["resumed"], whole["resumed"]) == (2, 0)
    check_place(tmp_path / "run")
    TRIED[COMPARED] += 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.slow
@pytest.mark.parametrize("device", ["auto", DEVICE])
def test_two_processes_have_a_gpu_each(device: str, undisturbed: Undisturbed, bert_hub: Path, tmp_path: Path) -> None:
    """Each process solves its own rows, so the products have other shapes than those of one process."""
    arguments = mini(bert_hub, "guidance=feature", "guidance.heads=always", f"device={device}", "out=run")
    status, said = wait_for(start(tmp_path, *TORCHRUN, "-m", "epmq_cli", *arguments))
    assert status == 0, said
    check_place(tmp_path / "run")
    check_near(tmp_path / "run", undisturbed(bert_hub, OWN), Scene(bert_hub, *OPTIONS), SAMPLES)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_of_the_same_model_gives_the_same_bytes(
    undisturbed: Undisturbed, bert_hub: Path, tmp_path: Path
) -> None:
    """On a machine with several GPUs of one model."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    last = max(index for index, name in enumerate(names) if name == names[0])
    if last == 0:
        pytest.skip("no other GPU is like the first")
    run_in(tmp_path, bert_hub, *OPTIONS, f"device=cuda:{last}")
    assert measured(tmp_path)["environment"]["device"] == f"cuda:{last}"
    assert files(tmp_path) == files(undisturbed(bert_hub, OWN))
