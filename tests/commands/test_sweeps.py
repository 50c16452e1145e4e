"""Oracle: the files of the same sweep when its jobs run one after the other."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import OmegaConf

from epmq_cli.commands.error_report import format_error
from epmq_cli.config.instantiate import conf_dir

SWEEP = ("merge=ties,average", "calib.samples=8", "eval.stages=[]", "device=cpu")


NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (extra ray, 370 MB)")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["cores", "submitit_local", pytest.param("ray_cluster", marks=NEEDS_RAY)])
def test_jobs_of_a_sweep_run_side_by_side(launcher: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "epmq_cli", "run", "-m", f"hydra/launcher={launcher}", *SWEEP, f"out={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*/metrics.json")]
    assert sorted(metrics["config"]["merge"]["_target_"].rpartition(".")[2] for metrics in found) == ["Average", "Ties"]
    assert len(list(tmp_path.glob("*/checkpoint/model.safetensors"))) == 2
    assert len(list(tmp_path.glob("*/.hydra/overrides.yaml"))) == 2


@pytest.mark.slow
@NEEDS_RAY
def test_jobs_of_ray_start_in_the_folder_of_the_sweep(tmp_path: Path) -> None:
    """On a cluster that was started elsewhere, the usual case."""
    for name in ("cluster", "sweep"):
        (tmp_path / name).mkdir()
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **token}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--include-dashboard=false"]
    options = ("--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}", "--num-cpus=2")
    cluster = subprocess.Popen([*ray, *options], cwd=tmp_path / "cluster", env=environment, stdout=subprocess.DEVNULL)
    try:
        overrides = ["hydra/launcher=ray_cluster", f"hydra.launcher.ray.init.address={address}", *SWEEP, "out=here"]
        command = [sys.executable, "-m", "epmq_cli", "run", "-m", *overrides]
        subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path / "sweep", timeout=200)
    finally:
        cluster.terminate()
        cluster.wait(60)
    assert len(list(tmp_path.glob("sweep/here/*/metrics.json"))) == 2


def test_a_ray_worker_changes_to_the_folder_of_the_shipped_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = OmegaConf.load(conf_dir() / "hydra" / "launcher" / "ray_cluster.yaml").ray.init.runtime_env
    monkeypatch.chdir("/")
    (variable,) = shipped.env_vars
    monkeypatch.setenv(variable, str(tmp_path))
    get_method(shipped.worker_process_setup_hook)()
    assert Path.cwd() == tmp_path


def test_the_shipped_slurm_settings_are_valid_for_submitit() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=["hydra/launcher=slurm", "out=x"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.gpus_per_node, launcher.timeout_min, launcher.nodes) == (1, 240, 1)


@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_the_error_for_a_missing_launcher_names_its_extra(launcher: str) -> None:
    from hydra.errors import MissingConfigException

    error = MissingConfigException(
        f"Could not find 'hydra/launcher/{launcher}'\n\nAvailable options:\n\tbasic\nConfig search path", "x"
    )
    wanted = f"hydra/launcher={launcher} is not installed; get it with pip install 'epmq-cli[{launcher}]'"
    assert format_error(error, "run", []) == wanted
