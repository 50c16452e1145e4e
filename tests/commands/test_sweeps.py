"""Oracle: what the jobs of a sweep leave behind when they run one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from epmq_cli.commands.app import explain
from epmq_cli.config import conf_dir

SWEEP = ("merge=ties,average", "calib.samples=8", "eval.stages=[]", "device=cpu")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_of_a_sweep_run_side_by_side(launcher: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "epmq_cli", "run", "-m", f"hydra/launcher={launcher}", *SWEEP, f"out={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*/metrics.json")]
    assert sorted(metrics["config"]["merge"]["_target_"].rpartition(".")[2] for metrics in found) == ["Average", "Ties"]
    assert len(list(tmp_path.glob("*/checkpoint/model.safetensors"))) == 2


def test_the_shipped_slurm_settings_are_submitits() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=["hydra/launcher=slurm", "out=x"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.gpus_per_node, launcher.timeout_min, launcher.nodes) == (1, 240, 1)


def test_a_launcher_that_is_not_installed_is_named_with_its_extra() -> None:
    from hydra.errors import MissingConfigException

    error = MissingConfigException(
        "Could not find 'hydra/launcher/joblib'\n\nAvailable options:\n\tbasic\nConfig search path", "x"
    )
    wanted = "hydra/launcher=joblib is not installed; get it with pip install 'epmq-cli[joblib]'"
    assert explain(error, "run", []) == wanted
