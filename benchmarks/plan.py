"""Compares the estimates of `epmq run --plan` with runs: memory, disk and time.

    python benchmarks/plan.py [--layers 2] [--folder runs/plan]

The runs are the built-in suite, and a random Llama of benchmarks/larger.py with two experts (hidden 1024). One thread
each: then the processor time of a run is the wall time of an idle machine, for which the estimates are made, also if
other programs run. The cache is off. A ratio is estimate / measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from larger import make

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def planned(arguments: list[str]) -> dict:
    """The estimate of a run."""
    command = [sys.executable, "-m", "epmq_cli", "run", "--plan", "--format=json", *arguments]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    return json.loads(out.stdout)["estimate"]


def measured(arguments: list[str], folder: Path) -> dict[str, float]:
    """Processor seconds, peak bytes and checkpoint bytes of a run."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "epmq_cli", "run", *arguments, f"out={folder}", "cache=false"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}")
    metrics = json.loads((folder / "metrics.json").read_text())
    for name, stage in metrics["stages"].items():
        print(f"    {name:<24} {stage['seconds']:8.1f} s wall, {stage['peak_host_bytes'] / 1e6:8.0f} MB")
    return {
        "seconds": used.ru_utime + used.ru_stime,
        "host": max(stage["peak_host_bytes"] for stage in metrics["stages"].values()),
        "checkpoint": metrics["bytes"]["model_packed"],
    }


def compare(name: str, arguments: list[str], folder: Path) -> None:
    """Prints estimates, measurements and ratios."""
    print(name, *arguments)
    estimate = planned(arguments)
    print("   ", {key: round(value, 1) for key, value in estimate["seconds"].items()}, estimate["measured"])
    own = {
        "seconds": estimate["total_seconds"],
        "host": estimate["memory"]["host"],
        "checkpoint": estimate["disk"]["checkpoint"],
    }
    run = measured(arguments, folder)
    for key, value in own.items():
        print(f"  {key:<12} estimated {value:14.1f} measured {run[key]:14.1f} ratio {value / run[key]:.2f}")


def main() -> None:
    """Compares both runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/plan"))
    chosen = parser.parse_args()
    folder = chosen.folder / f"larger-{chosen.layers}"
    folder.mkdir(parents=True, exist_ok=True)
    make(folder, chosen.layers)
    compare("tiny", [], chosen.folder / "run_tiny")
    larger = ["--config-dir", str(folder / "configs"), "suite=larger", "calib.samples=32", "eval.stages=[]"]
    compare("larger", larger, chosen.folder / "run_larger")


if __name__ == "__main__":
    main()
