"""Measures a sweep with and without the cache: 8 jobs on the built-in suite that differ in merge, bits and grid.

    python benchmarks/sweep.py                      # merge=ties,average bits=3,4 quant.grid=mse,hessian
    python benchmarks/sweep.py --overrides calib.samples=32
    python benchmarks/sweep.py --teachers           # why the cache does not keep teachers' activations
    python benchmarks/sweep.py --recipes            # score and seconds of recipe=fast, balanced and best

Each sweep is `epmq run -m` as a user starts it, one job after the other. Each round runs it with `cache=false` and with
an empty cache, then the first job alone without the cache and with the full cache. The scores and checkpoints of both
sweeps are compared. `--teachers` always uses the CPU. `--recipes` runs each recipe with the seeds 0, 1, 2 and so on
(--repeats), without the cache: medians of the scores and of the processor seconds of whole runs, which score the result
alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SWEEP = ("merge=ties,average", "bits=3,4", "quant.grid=mse,hessian")
SHARED = ("score base and experts", "teach", "merge", "score merged")
RECIPES = ("fast", "balanced", "best")


def run(out: Path, cache: Path | None, arguments: argparse.Namespace, *options: str) -> float:
    """Runs the command and returns its wall seconds."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "epmq_cli", "run", *options, f"out={out}", f"device={arguments.device}"]
    command += [*arguments.overrides, *([] if cache else ["cache=false"])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "EPMQ_CACHE": str(cache)}
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def jobs(out: Path, name: str = "*") -> dict[str, tuple[Any, str]]:
    """Returns the metrics and the sha256 of the weights of each job whose folder matches `name`."""
    found = {}
    for path in sorted(out.glob(f"{name}/metrics.json")):
        weights = (path.parent / "checkpoint" / "model.safetensors").read_bytes()
        found[path.parent.name] = (json.loads(path.read_text()), hashlib.sha256(weights).hexdigest())
    return found


def stage_seconds(found: dict[str, tuple[Any, str]]) -> float:
    """Returns the seconds of all jobs in the stages whose results can be shared."""
    return sum(metrics["stages"][stage]["seconds"] for metrics, _ in found.values() for stage in SHARED)


def same(first: dict[str, tuple[Any, str]], second: dict[str, tuple[Any, str]]) -> bool:
    """Returns whether two sweeps have the same weights and scores."""
    results = [{job: (m["scores"], weights) for job, (m, weights) in found.items()} for found in (first, second)]
    return results[0] == results[1]


def one_round(out: Path, cache: Path, arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, float], str]:
    """Returns the seconds of each variant, in all and in the stages that jobs share, and the device's name."""
    shutil.rmtree(cache, ignore_errors=True)
    first = [option.partition(",")[0] for option in SWEEP]
    whole = {
        "without": run(out / "without", None, arguments, "-m", *SWEEP),
        "with an empty cache": run(out / "with", cache, arguments, "-m", *SWEEP),
        "one job, without": run(out / "one", None, arguments, *first),
    }
    alone = jobs(out, "one")
    whole["one job, full cache"] = run(out / "one", cache, arguments, *first)
    plain, kept, again = jobs(out / "without"), jobs(out / "with"), jobs(out, "one")
    if len(plain) != 2 ** len(SWEEP) or not same(plain, kept) or not same(alone, again):
        sys.exit("the cache changed a result")
    stages = dict(zip(whole, map(stage_seconds, (plain, kept, alone, again)), strict=True))
    return whole, stages, next(iter(again.values()))[0]["environment"]["device_name"]


def compare(arguments: argparse.Namespace) -> None:
    """Runs the sweeps and prints the table."""
    out, cache = arguments.out.resolve(), arguments.out.resolve() / "cache"
    rounds = [one_round(out, cache, arguments) for _ in range(arguments.repeats)]
    wholes, stages = [whole for whole, _, _ in rounds], [found for _, found, _ in rounds]
    print(f"{' '.join([*SWEEP, *arguments.overrides])}: {2 ** len(SWEEP)} jobs, {rounds[0][2]}, ", end="")
    print(f"{arguments.threads} threads, medians of {arguments.repeats}; results the same\n")
    print("| | whole, s | times as long as without | stages that jobs have in common, s |\n|---|---|---|---|")
    for name in wholes[0]:
        plain = "one job, without" if name.startswith("one") else "without"
        seconds = statistics.median(whole[name] for whole in wholes)
        ratio = statistics.median(whole[name] / whole[plain] for whole in wholes)
        common = statistics.median(found[name] for found in stages)
        print(f"| {name} | {seconds:.1f} | {ratio:.2f} | {common:.1f} |")
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    print(f"\nThe cache has {size / 1e6:.2f} MB; whole seconds of each round: {json.dumps(wholes)}")


def recipes(arguments: argparse.Namespace) -> None:
    """Runs each recipe and prints the table."""
    out, found = arguments.out.resolve(), dict[str, list[tuple[float, float]]]()
    for seed in range(arguments.repeats):
        for name in RECIPES:
            start = resource.getrusage(resource.RUSAGE_CHILDREN)
            run(out / name, None, arguments, f"recipe={name}", f"seed={seed}", "eval.stages=[quantized]")
            end = resource.getrusage(resource.RUSAGE_CHILDREN)
            score = json.loads((out / name / "metrics.json").read_text())["scores"]["average"]["quantized"]
            found.setdefault(name, []).append((score, end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime))
            print(f"{name}, seed {seed}: {found[name][-1]}", file=sys.stderr, flush=True)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    print(f"{' '.join(arguments.overrides)}: {arguments.threads} threads, medians of {arguments.repeats} seeds\n")
    print("| recipe | score | processor seconds | times balanced |\n|---|---|---|---|")
    for name, (score, seconds) in medians.items():
        print(f"| {name} | {score:.4g} | {seconds:.0f} | {seconds / medians['balanced'][1]:.2f} |")


def teachers(folder: Path, threads: int) -> None:
    """Prints the time to compute the activations that the walk needs from a teacher's block and to read them from disk.

    The block is one of CLIP-ViT-B/32 on 256 images. The activations are the inputs of q, out, fc1 and fc2 (four times
    as wide) and the residual stream at two places: 9 x 768 numbers in float32 for each of 50 tokens.
    """
    import torch
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    torch.set_num_threads(threads)
    config = CLIPVisionConfig(attn_implementation="sdpa")
    block, inputs = CLIPEncoderLayer(config).eval(), torch.randn(256, 50, config.hidden_size)
    found = np.random.default_rng(0).random((256 * 50, 9 * config.hidden_size), np.float32)
    path = folder / "activations"
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, list[float]] = {"computed": [], "written": [], "read, cold": [], "read, warm": []}

    def timed(name: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        seconds[name].append(time.perf_counter() - start)

    def write() -> None:
        with path.open("wb") as file:
            found.tofile(file)
            os.fsync(file.fileno())

    for _ in range(7):
        with torch.inference_mode():
            timed("computed", lambda: [block(batch, attention_mask=None) for batch in inputs.split(32)])
        timed("written", write)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for name in ("read, cold", "read, warm"):
            timed(name, lambda: np.fromfile(path, np.float32))
    path.unlink()
    medians = ", ".join(f"{name} in {1000 * statistics.median(each):.0f} ms" for name, each in seconds.items())
    print(f"{found.nbytes / 1e6:.0f} MB: {medians}; {threads} threads, medians of 7")


def main() -> None:
    """Parses the command line, runs the benchmark and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--teachers", action="store_true")
    parser.add_argument("--recipes", action="store_true")
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of every job")
    arguments = parser.parse_args()
    if arguments.teachers:
        teachers(arguments.out, arguments.threads)
    elif arguments.recipes:
        recipes(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
