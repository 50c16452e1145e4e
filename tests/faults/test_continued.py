"""Oracles: the folders that exist, and the checkpoint of an uninterrupted run."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from epmq_cli.store.run_lock import exclusive_lock
from tests.faults.driver import PACK, STAGES, at_stage, attempt, command, files, mini
from tests.helpers.hubs import run_in
from tests.helpers.tiers import first


def wait() -> None:
    """Waits for the next second, so that the next run gets another folder."""
    time.sleep(1.05 - time.time() % 1)


def folders(place: Path) -> list[Path]:
    return sorted((place / "runs").iterdir())


def test_the_same_command_continues_in_the_unfinished_folder(bert_hub: Path, tmp_path: Path) -> None:
    for stage in (3, 8):
        assert command(tmp_path, *mini(bert_hub), hook=at_stage(stage))[0] == -signal.SIGKILL
    (left,) = folders(tmp_path)
    status, said = command(tmp_path, *mini(bert_hub))
    assert status == 0
    assert f"{left.relative_to(tmp_path)} was interrupted; the run continues after the last finished block" in said
    assert folders(tmp_path) == [left]
    assert {path.name for path in left.iterdir()} == {".hydra", "checkpoint", "metrics.json", "report.html", "run.log"}
    metrics = json.loads((left / "metrics.json").read_text())
    assert metrics["resumed"] == 2
    assert not [override for override in metrics["overrides"] if override.startswith("out=")]
    run_in(tmp_path / "whole", bert_hub, "eval.samples=8")
    assert files(left).keys() == files(tmp_path / "whole").keys()
    assert files(left)["model.safetensors"] == files(tmp_path / "whole")["model.safetensors"]


@pytest.mark.slow
def test_another_command_does_not_touch_an_interrupted_run(bert_hub: Path, tmp_path: Path) -> None:
    assert command(tmp_path, *mini(bert_hub), hook=at_stage(PACK))[0] == -signal.SIGKILL
    (left,) = folders(tmp_path)
    kept = {path: path.read_bytes() for path in (left / ".resume").rglob("*") if path.is_file()}
    assert command(tmp_path, *mini(bert_hub, "bits=3"), hook=wait)[0] == 0
    assert command(tmp_path, *mini(bert_hub, "resume=never"), hook=wait)[0] == 0
    assert len(folders(tmp_path)) == 3
    assert {path: path.read_bytes() for path in (left / ".resume").rglob("*") if path.is_file()} == kept


@pytest.mark.slow
def test_an_active_run_is_not_continued(bert_hub: Path, tmp_path: Path) -> None:
    assert command(tmp_path, *mini(bert_hub), hook=at_stage(PACK))[0] == -signal.SIGKILL
    (left,) = folders(tmp_path)
    with exclusive_lock(left):
        status, said = command(tmp_path, *mini(bert_hub), hook=wait)
        assert status == 0, said
        assert len(folders(tmp_path)) == 2
        status, said = command(tmp_path, *mini(bert_hub, f"out={left}"))
        assert status == 1
        assert said.endswith(f"epmq: another run is using out={left}; wait until it ends, or choose another out\n")
        assert "Traceback" not in said
    assert not (left / "metrics.json").exists()


@pytest.mark.slow
def test_a_sweep_continues_with_the_interrupted_job(bert_hub: Path, tmp_path: Path) -> None:
    arguments = ("-m", *mini(bert_hub, "bits=2,3")[1:])
    assert command(tmp_path, "run", *arguments, hook=at_stage(STAGES + PACK))[0] == -signal.SIGKILL
    (sweep,) = folders(tmp_path)
    (first,) = sweep.glob("*/metrics.json")
    before = first.stat().st_mtime_ns
    status, said = command(tmp_path, "run", *arguments)
    assert status == 0, said
    assert folders(tmp_path) == [sweep]
    assert first.stat().st_mtime_ns == before
    assert f"{first.parent.relative_to(tmp_path)} already contains the results of this job" in said
    assert sorted(json.loads(path.read_text())["resumed"] for path in sweep.glob("*/metrics.json")) == [0, 1]
    assert not list(sweep.rglob(".resume"))
    assert not (sweep / ".unfinished").exists()


@pytest.mark.parametrize("change", first(1, ["option", "expert", "calibration data", "never"]))
def test_blocks_of_another_run_are_never_used(change: str, bert_hub: Path, tmp_path: Path) -> None:
    """Oracle: a run with the change in an empty folder."""
    hub, run, options = tmp_path / "hub", tmp_path / "run", ["guidance=feature", "eval.samples=8"]
    shutil.copytree(bert_hub, hub)
    suite = hub / "configs" / "suite" / "mini.yaml"
    suite.write_text(suite.read_text().replace(str(bert_hub), str(hub)))
    assert attempt(run, hub, *options, hook=at_stage(PACK)) == -signal.SIGKILL
    (key,) = (run / ".resume").glob("*/")
    if change == "option":
        options.append("guidance.lam=0.1")
    elif change == "expert":
        shutil.copytree(hub / "second", hub / "first", dirs_exist_ok=True)
    elif change == "calibration data":
        shutil.copyfile(hub / "second_train.tsv", hub / "first_train.tsv")
    else:
        options.append("resume=never")
    assert attempt(run, hub, *options, hook=at_stage(3)) == -signal.SIGKILL
    assert key.exists() is (change != "never") or not list(key.glob("last/*"))
    options = [option for option in options if option != "resume=never"]
    assert attempt(run, hub, *options) == 0
    assert attempt(tmp_path / "whole", hub, *options) == 0
    assert files(run) == files(tmp_path / "whole")
    assert {path.name for path in run.iterdir()} == {"checkpoint", "metrics.json", "report.html"}
    assert json.loads((run / "metrics.json").read_text())["resumed"] == 1


@pytest.mark.parametrize("option", first(0, ["calib.memory=1KB", "eval.samples=5", "calib.student=disk"]))
def test_options_that_do_not_affect_the_result_may_change(option: str, bert_hub: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert attempt(run, bert_hub, "guidance=feature", hook=at_stage(PACK)) == -signal.SIGKILL
    assert attempt(run, bert_hub, "guidance=feature", option) == 0
    assert attempt(whole, bert_hub, "guidance=feature", option) == 0
    assert files(run) == files(whole)
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (run, whole)]
    assert found[0]["scores"] == found[1]["scores"]
    assert (found[0]["resumed"], found[1]["resumed"]) == (1, 0)
