"""Oracle: the run of one process, byte for byte, on mixtures whose experts see no token in one process, or in none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.driver import command, files, mini, torchrun
from tests.helpers.architectures import MIXED, built, crowded
from tests.helpers.minihub import decoder_files

FEW = ("calib.samples=6", "calib.batch_size=3", "eval.stages=[]", "suite.family=auto")
"""Two batches, so that each of two processes has one."""


def both(hub: Path, folder: Path, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of two processes and of one, whose checkpoints must be equal."""
    arguments = (*mini(hub), *FEW, *options)
    two = torchrun(folder, *arguments, "out=two")
    assert [process.returncode for process in two] == [0, 0], two[0].stderr + two[1].stderr
    status, said = command(folder, *arguments, "out=one")
    assert status == 0, said
    assert files(folder / "two") == files(folder / "one")
    found, wanted = (json.loads((folder / name / "metrics.json").read_text()) for name in ("two", "one"))
    return found, wanted


def rounded(value: Any) -> Any:
    """The value; a number equals others up to rounding."""
    return pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value


CASES = [
    *((kind, options) for kind in MIXED for options in ("", "quant=awq")),
    *(
        ("mixtral", options)
        for options in ("guidance=expert", "guidance=asymmetric", "quant=smoothquant bits=8 group_size=-1", "bits=3.5")
    ),
    ("mixtral", "+suite.tasks.first.packing=false guidance.sweeps=2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_two_processes_write_the_checkpoint_of_one(kind: str, options: str, tmp_path: Path) -> None:
    hub = decoder_files(tmp_path / "hub", built(crowded(kind)))
    found, wanted = both(hub, tmp_path, "guidance=feature", *options.split())
    assert found["events"] == wanted["events"]
    assert wanted["events"]["unrouted"] > 0
    for layer, other in zip(found["layers"], wanted["layers"], strict=True):
        assert {name: rounded(value) for name, value in layer.items()} == other
