"""Oracle: the checkpoint and the measurements of the same run without an interruption, byte for byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from epmq_cli.checkpoint.model_card import Picture
from epmq_cli.refine import trial
from tests.faults.driver import STAGES, at_file, at_stage, attempt, files, mini
from tests.helpers.counts import COMPARED, KILLS, TRIED
from tests.helpers.hubs import run_in
from tests.helpers.minihub import build

FEATURE = ("guidance=feature", "eval.samples=8")
PICTURE = "scores.png"
TIMES = ("created", "stages", "resumed")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "heads": ("clip", ("guidance=feature", "guidance.heads=always")),
    "refined": ("bert", ("guidance=feature", "refine=distill", "refine.epochs=2", "refine.packed_epochs=1")),
    "refined blocks": ("bert", ("guidance=feature", "refine=blocks", "refine.iterations=4", "refine.every=2")),
    "sweeps and widths": ("bert", ("guidance=feature", "guidance.sweeps=2", "bits=3.5")),
    "widths": ("bert", ("guidance=feature", "bits=3.5")),
    "budget": ("bert", ("guidance=feature", "budget=40KB")),
    "sensitivity": ("bert", ("guidance=feature", "bits=2.5", "quant.sensitivity=divergence")),
    "auto": ("bert", ("guidance=feature", "guidance.rho=auto", "guidance.lam=auto")),
    "no quantizer": ("bert", ("guidance=feature", "quant=none")),
    "merged, files": ("bert", ("guidance=merged", "calib.memory=1KB", "calib.student=disk", "merge=ties")),
    "zero points, bfloat16": ("bert", ("guidance=feature", "quant.symmetric=false", "pack.dtype=bfloat16")),
    "two stacks": ("t5-tied", ("guidance=feature",)),
    "decoder": ("llama", ("guidance=feature",)),
    "shared keys": ("deberta", ("guidance=feature",)),
}


def measured(folder: Path) -> dict[str, Any]:
    """metrics.json without times."""
    found = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in found.items() if name not in TIMES}


def check_end(run: Path, whole: Path) -> None:
    """Compares a run that was killed and continued with one that was not."""
    assert files(run) == files(whole)
    assert json.dumps(measured(run)) == json.dumps(measured(whole))
    TRIED[COMPARED] += 1


def check_killed(run: Path, whole: Path) -> None:
    """A killed run leaves no results, or a checkpoint that is complete but for the scores in its card."""
    if (run / "checkpoint").exists():
        card, left, wanted = {"README.md", "manifest.json", PICTURE}, files(run), files(whole)
        assert {PICTURE, *(name for name in left if not name.startswith("."))} == wanted.keys()
        assert all(left[name] == wanted[name] for name in wanted.keys() - card)


@pytest.fixture(autouse=True)
def short_picture(short_pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards have a picture that takes no time to draw."""
    picture = {PICTURE: Picture(b"picture", "scores")}
    monkeypatch.setattr("epmq_cli.report.page.pictures.score_pictures", lambda scores: picture)


@pytest.fixture(autouse=True)
def every_gain_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The miniatures hold out too few samples to tell a gain of refinement from chance."""
    monkeypatch.setattr(trial, "CERTAIN", 0)


@pytest.fixture
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The miniature hub of a kind."""
    kind = request.param
    found: Path = request.getfixturevalue(f"{kind}_hub") if kind in ("bert", "clip") else build(tmp_path / "hub", kind)
    return found


def test_killed_before_every_stage(bert_hub: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    run_in(whole, bert_hub, *FEATURE)
    for number in range(1, STAGES + 1):
        assert attempt(run, bert_hub, *FEATURE, hook=at_stage(number)) == -signal.SIGKILL
        assert not (run / "metrics.json").exists()
        check_killed(run, whole)
    assert attempt(run, bert_hub, *FEATURE) == 0
    check_end(run, whole)
    assert {path.name for path in run.iterdir()} == {"checkpoint", "metrics.json", "report.html"}
    assert json.loads((run / "metrics.json").read_text())["resumed"] == STAGES - 1  # none before the first


@pytest.mark.slow
def test_killed_before_every_fourth_file(bert_hub: Path, tmp_path: Path) -> None:
    assert kill_repeatedly(tmp_path, bert_hub, FEATURE, 4) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(("hub", "options"), KINDS.values(), ids=KINDS, indirect=["hub"])
def test_killed_before_every_other_file(hub: Path, options: tuple[str, ...], tmp_path: Path) -> None:
    assert kill_repeatedly(tmp_path, hub, (*options, "eval.samples=8"), 2) >= 15


def kill_repeatedly(folder: Path, hub: Path, options: tuple[str, ...], step: int) -> int:
    """Kills a run a few files later each time until it completes; returns the number of kills."""
    run, whole, kills = folder / "run", folder / "whole", 0
    assert attempt(whole, hub, *options) == 0
    while (status := attempt(run, hub, *options, hook=at_file(1 + kills * step, run))) == -signal.SIGKILL:
        check_killed(run, whole)
        kills += 1
        if (run / "metrics.json").exists():  # killed after it completed
            break
    assert status in (0, -signal.SIGKILL)
    check_end(run, whole)
    return kills


@pytest.mark.slow
def test_killed_at_any_time(bert_hub: Path, tmp_path: Path) -> None:
    options, chance = ("guidance=feature", "guidance.sweeps=2", "bits=3.5", "eval.samples=8"), random.Random(0)
    whole = tmp_path / "whole"
    assert attempt(whole, bert_hub, *options) == 0
    for number in range(10):
        run, kills = tmp_path / str(number), 0
        while not (run / "metrics.json").exists():
            seconds = chance.uniform(0, 0.6) if kills < 10 else None
            status = attempt(run, bert_hub, *options, seconds=seconds)
            assert status in (0, -signal.SIGKILL)
            check_killed(run, whole)
            kills += status != 0
        check_end(run, whole)


@pytest.mark.slow
def test_processes_of_the_command_killed_at_any_time(bert_hub: Path, tmp_path: Path) -> None:
    """With the default folder, whose name differs at each start."""
    chance, command = random.Random(1), (sys.executable, "-m", "epmq_cli", *mini(bert_hub, "guidance=feature"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    begun = time.monotonic()
    subprocess.run([*command, "out=whole"], check=True, **options)  # type: ignore[call-overload]
    lasts, kills = time.monotonic() - begun, 0
    for _ in range(8):
        process = subprocess.Popen(command, **options)  # type: ignore[call-overload]
        try:
            status = process.wait(chance.uniform(0.3, 1) * lasts)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        TRIED[KILLS] += status != 0
    subprocess.run(command, check=True, **options)  # type: ignore[call-overload]
    assert kills >= 1
    for metrics in (tmp_path / "runs").glob("*/metrics.json"):
        assert files(metrics.parent) == files(tmp_path / "whole")
        TRIED[COMPARED] += 1
    assert not list((tmp_path / "runs").rglob(".resume"))
