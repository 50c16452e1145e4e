"""Oracle: a run on shipped tasks from a mirror scores every task of the suite; a second run writes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.hubs import run_in
from tests.helpers.mirror import image_mirror, prepare

pytest.importorskip("datasets", reason="needs the extra hub")
TASKS = {"svhn": "first", "fer2013": "second", "cifar100": "first"}


@pytest.mark.slow
def test_shipped_tasks_run_from_a_mirror(clip_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, tmp_path / "cache")
    mirror = image_mirror(tmp_path / "mirror", TASKS)
    (tmp_path / "configs" / "suite").mkdir(parents=True)
    lines = [f"  - clip_tasks@tasks.{task}: {task}" for task in TASKS]
    experts = json.dumps({task: str(clip_hub / expert) for task, expert in TASKS.items()})
    lines += ["  - _self_", "_target_: epmq_cli.data.suite.Suite", "name: mini", "family: clip"]
    lines += [f"base: {clip_hub / 'base'}", f"experts: {experts}"]
    (tmp_path / "configs" / "suite" / "mini.yaml").write_text("\n".join(["defaults:", *lines]))
    options = (f"data_root={mirror}", "calib.samples=5")
    first, again = (run_in(tmp_path / name, tmp_path, *options) for name in ("a", "b"))
    run_in(tmp_path / "c", tmp_path, *options, "eval.samples=2")
    scores = json.loads((tmp_path / "a" / "metrics.json").read_text())["scores"]
    assert set(scores["tasks"]) == set(TASKS)
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
