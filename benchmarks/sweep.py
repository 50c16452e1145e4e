"""Time of a sweep with a cache and without: 8 jobs on the built-in suite that differ in merge, bits and grid.

    python benchmarks/sweep.py                      # merge=ties,average bits=3,4 quant.grid=mse,hessian
    python benchmarks/sweep.py --overrides calib.samples=32

Each sweep is `epmq run -m` as a user starts it, one job after the other, with an empty cache or `cache=false`, by turns;
then the first job alone again, with the full cache. Scores and checkpoints of both sweeps are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SWEEP = ("merge=ties,average", "bits=3,4", "quant.grid=mse,hessian")
SHARED = ("score base and experts", "teach", "merge", "score merged")


def run(out: Path, cache: Path | None, arguments: argparse.Namespace, *options: str) -> float:
    """Wall seconds of the command."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "epmq_cli", "run", *options, f"out={out}", f"device={arguments.device}"]
    command += [*arguments.overrides, *([] if cache else ["cache=false"])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "EPMQ_CACHE": str(cache)}
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def jobs(out: Path) -> dict[str, tuple[Any, str]]:
    """The metrics of each job, and the sha256 of its weights."""
    found = {}
    for path in sorted(out.glob("*/metrics.json")):
        weights = (path.parent / "checkpoint" / "model.safetensors").read_bytes()
        found[path.parent.name] = (json.loads(path.read_text()), hashlib.sha256(weights).hexdigest())
    return found


def stage_seconds(found: dict[str, tuple[Any, str]]) -> float:
    """Seconds of all jobs in the stages whose results jobs can have in common."""
    return sum(metrics["stages"][stage]["seconds"] for metrics, _ in found.values() for stage in SHARED)


def same(first: dict[str, tuple[Any, str]], second: dict[str, tuple[Any, str]]) -> bool:
    """Whether two sweeps gave the same weights and scores."""
    results = [{job: (m["scores"], weights) for job, (m, weights) in found.items()} for found in (first, second)]
    return results[0] == results[1]


def main() -> None:
    """Parses the command line, runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of every job")
    arguments = parser.parse_args()
    out, cache = arguments.out.resolve(), arguments.out.resolve() / "cache"
    times: dict[str, list[float]] = {"without": [], "with an empty cache": [], "one job, full cache": []}
    stages: dict[str, list[float]] = {"without": [], "with an empty cache": []}
    for _ in range(arguments.repeats):
        shutil.rmtree(cache, ignore_errors=True)
        times["without"].append(run(out / "without", None, arguments, "-m", *SWEEP))
        times["with an empty cache"].append(run(out / "with", cache, arguments, "-m", *SWEEP))
        first = [option.partition(",")[0] for option in SWEEP]
        times["one job, full cache"].append(run(out / "one", cache, arguments, *first))
        plain, kept = jobs(out / "without"), jobs(out / "with")
        stages["without"].append(stage_seconds(plain))
        stages["with an empty cache"].append(stage_seconds(kept))
        if len(plain) != 2 ** len(SWEEP) or not same(plain, kept):
            sys.exit("the cache changed a result")
    print(f"medians of {arguments.repeats}, {len(plain)} jobs, {arguments.threads} threads, results the same\n")
    print("| | whole, s | stages that jobs have in common, s |\n|---|---|---|")
    for name, seconds in times.items():
        common = f"{statistics.median(stages[name]):.1f}" if name in stages else ""
        print(f"| {name} | {statistics.median(seconds):.1f} | {common} |")
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    print(f"\nThe cache has {size / 1e6:.2f} MB; whole seconds of each: {json.dumps(times)}")


if __name__ == "__main__":
    main()
