"""Oracle: that of test_memory.py; every family, place and kind of calibration, at sizes down to one sample."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import epmq_cli.pipeline.calibration as guide
from tests.faults.device import CALIBRATION, SCORING, Device
from tests.faults.driver import files
from tests.faults.short import OPTIONS, PLACES, Undisturbed, check_place, check_same, hub_of, measured
from tests.helpers.hubs import run_in
from tests.helpers.minihub import KINDS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "clip", *KINDS])
def test_every_family_at_every_size(
    kind: str, undisturbed: Undisturbed, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub = hub_of(kind, request, tmp_path)
    for samples in range(1, 8):
        run = tmp_path / str(samples)
        with Device(4 * samples if kind == "swin" else samples).during(*CALIBRATION, *SCORING):  # it has four windows
            run_in(run, hub, *OPTIONS)
        assert check_same(run, undisturbed(hub))["batches_halved"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["bert", "clip", "t5", "llama", "vit", "deberta"])
def test_every_place_of_every_kind(
    kind: str, place: str, undisturbed: Undisturbed, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub = hub_of(kind, request, tmp_path)
    for samples in (1, 3):
        check_place(place, samples, hub, tmp_path / str(samples), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("guidance=expert",),
        ("guidance=merged", "merge=ties"),
        ("guidance=asymmetric",),
        ("guidance.sweeps=2", "bits=3.5"),
        ("bits=3.5", "calib.memory=1KB"),
        ("calib.student=disk", "resume=never"),
        ("calib.batch_size=7", "guidance.lam=auto"),
        ("calib.batch_size=24", "quant=none"),
    ],
    ids=" ".join,
)
def test_every_kind_of_calibration(
    options: tuple[str, ...], undisturbed: Undisturbed, bert_hub: Path, tmp_path: Path
) -> None:
    whole = undisturbed(bert_hub, *options)
    with Device(2, after=20).during((guide, "calibrate")):
        run_in(tmp_path / "run", bert_hub, *OPTIONS, *options)
    assert check_same(tmp_path / "run", whole)["batches_halved"] >= 1


@pytest.mark.slow
def test_two_threads(tmp_path: Path) -> None:
    """The linears of the built-in suite are wide enough to be shared by two threads."""
    options = ["device=cpu", "calib.samples=32", "eval.stages=[]"]
    script = (
        "import sys\nimport epmq_cli.pipeline.calibration as guide\nfrom epmq_cli import cli\n"
        "from tests.faults.device import CALIBRATION, Device\n"
        "Device(int(sys.argv.pop(1))).enter(*CALIBRATION)\ncli.main()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    for samples in (32, 5, 1):
        arguments = [sys.executable, "-c", script, str(samples), "run", *options, f"out={tmp_path / str(samples)}"]
        subprocess.run(arguments, check=True, env=environment, capture_output=True)
        assert files(tmp_path / str(samples)) == files(tmp_path / "32")
        assert (measured(tmp_path / str(samples))["events"]["batches_halved"] > 0) is (samples < 32)
