"""Oracle: the checkpoint of the same run without an interruption, byte for byte."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from tests.faults.driver import at_file, at_stage, attempt, files
from tests.hubs import run_in

STAGES = 8
FEATURE = ("guidance=feature", "eval.samples=8")
ALL = {
    "feature": FEATURE,
}


def whole(folder: Path) -> bool:
    """Whether a folder looks complete; its checkpoint must be, then."""
    return (folder / "checkpoint").exists()


def test_killed_in_front_of_every_stage(bert_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path / "whole", bert_hub, *FEATURE)
    for number in range(1, STAGES + 1):
        assert attempt(tmp_path / "run", bert_hub, *FEATURE, hook=at_stage(number)) == -signal.SIGKILL
        assert not (tmp_path / "run" / "metrics.json").exists()
    assert attempt(tmp_path / "run", bert_hub, *FEATURE) == 0
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["resumed"] == STAGES - 1  # in front of the first there is nothing to go on with
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint", "metrics.json"}


def test_killed_in_front_of_many_files(bert_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path / "whole", bert_hub, *FEATURE)
    step, kills, folder = 4, 0, tmp_path / "run"
    while attempt(folder, bert_hub, *FEATURE, hook=at_file(1 + kills * step, folder)) == -signal.SIGKILL:
        kills += 1
        print("kill", kills)
    assert files(folder) == files(tmp_path / "whole")
    print(kills)
