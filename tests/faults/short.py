"""Runs on a device with little memory, compared with the same runs with enough memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import epmq_cli.pipeline.calibration as guide
import epmq_cli.pipeline.steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.report.metrics_json import schema
from tests.faults.device import SCORES, Device, Place
from tests.faults.driver import files
from tests.helpers.hubs import config, run_in
from tests.helpers.minihub import build

Undisturbed = Callable[..., Path]
"""Returns the folder of a run with some options on a hub."""
OPTIONS = ("guidance=feature", "guidance.heads=always", "eval.samples=8")
AUTO = ("guidance.rho=auto",)
PLACES: dict[str, tuple[tuple[Place, ...], bool | None, tuple[str, ...]]] = {
    "experts are asked": (((guide, "run_teachers"),), None, ()),
    "the student walks": (((guide, "calibrate"),), False, ()),
    "the teachers walk": (((guide, "calibrate"),), True, ()),
    "options are chosen": (((guide, "tune_guidance"),), None, AUTO),
    "heads are solved": (((guide, "solve_heads"),), None, ()),
    "base and experts are scored": (((steps, "score_parts"),), None, ()),
    "merge and checkpoint are scored": ((SCORES,), None, ()),
}


def hub_of(kind: str, request: pytest.FixtureRequest, folder: Path) -> Path:
    found: Path = request.getfixturevalue(f"{kind}_hub") if kind in ("bert", "clip") else build(folder / "hub", kind)
    return found


def measured(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    jsonschema.validate(found, schema())
    return found


def check_same(folder: Path, whole: Path) -> dict[str, int]:
    """Checks that a run has the results of an undisturbed one; returns the events of the former."""
    found, wanted = measured(folder), measured(whole)
    assert files(folder) == files(whole)
    assert found["layers"] == wanted["layers"]
    assert found["guidance"] == wanted["guidance"]
    for task, scores in wanted["scores"]["tasks"].items():
        assert found["scores"]["tasks"][task] == pytest.approx(scores, rel=1e-6)
    assert not list(folder.rglob(".*"))
    assert not any(wanted["events"][name] for name in ("batches_halved", "eval_batches_halved"))
    events: dict[str, int] = found["events"]
    return events


def check_place(place: str, samples: int, hub: Path, folder: Path, undisturbed: Undisturbed) -> None:
    places, teacher, options = PLACES[place]
    device = Device(samples, teacher=teacher)
    with device.during(*places):
        run_in(folder, hub, *OPTIONS, *options)
    events = check_same(folder, undisturbed(hub, *options))
    assert device.refused == events["batches_halved"] + events["eval_batches_halved"]
    assert device.refused >= 1 or not guide.solves_heads(make_job(config(hub, *OPTIONS)))
