"""Measures time and peak memory of the pipeline by experts and samples: CLIP-ViT-B/32's shapes, random weights.

    python benchmarks/pipeline.py                             # 8 experts, 256 samples each
    python benchmarks/pipeline.py --experts 2 4 8 20          # growth with experts
    python benchmarks/pipeline.py --samples 64 128 256 512    # growth with samples
    python benchmarks/pipeline.py --processes 1 2             # torchrun, one thread per process
    python benchmarks/pipeline.py --device cuda

Each point is `epmq run` as a user starts it, with `eval.stages=[]`, since scores of random weights are meaningless.
Models and images are made once, in runs/pipeline. Peak memory is anonymous memory (watch.py), minus that of the same
number of processes that only import. On a GPU it is the peak of the tensors there (`peak_device_bytes` in metrics.json,
of the first process). The table then also has three lower bounds by the data sheet (floors.py): the time for the
calibration's large products in float32, which epmq uses, and in TF32, and the time to read base and experts once.
Several processes have one GPU each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

sys.path.insert(0, str(Path(__file__).parent))
from floors import RATES, floors
from full_size import save, tokenizer
from watch import Watched, watched

from epmq_cli.config.instantiate import build, conf_dir

MOST = 1024
IMPORTS = "import epmq_cli.pipeline.calibration, numba; from transformers import CLIPImageProcessor, CLIPModel"
SIZES = {"b32": (768, 3072, 12, 12, 224, 32), "tiny": (64, 128, 2, 4, 64, 32)}
FLOORS = ["products in float32, s", "in TF32", "reading, s"]
STAGES = {"read": "read", "merge": "merge", "calibrate and quantize": "calibrate, quantize", "pack": "pack"}


@dataclass(frozen=True)
class Point:
    """One setting: experts, samples of each, processes."""

    experts: int
    samples: int
    processes: int


def make(folder: Path, size: str, experts: int) -> None:
    """Makes the base and the experts that are missing."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    width, inner, layers, heads, image, patch = SIZES[size]
    vision = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": heads, "image_size": image, "patch_size": patch}
    text = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    missing = [f"task{index}" for index in range(experts) if not (folder / f"task{index}").is_dir()]
    if (folder / "base").is_dir() and not missing:
        return
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=vision, text_config={**text, "vocab_size": 64, "eos_token_id": 1})
    save(folder, CLIPModel(config).eval(), missing)
    CLIPImageProcessor(size={"shortest_edge": image}, crop_size=image).save_pretrained(folder / "base")
    tokenizer(folder, ["a", "photo", "of", "cat", "dog"], "", "</s>")
    generator = np.random.default_rng(0)
    images = {
        f"{split}_images": generator.integers(0, 256, (n, image, image, 3), np.uint8) for split, n in SPLITS.items()
    }
    np.savez(folder / "images.npz", **images, **{f"{split}_labels": np.arange(n) % 2 for split, n in SPLITS.items()})


SPLITS = {"train": MOST, "test": 2}
"""Number of images in each split; every task keeps the test split in memory, and it is not scored."""


def suite(folder: Path, experts: int) -> Path:
    """Writes a suite with this number of experts; returns its config folder."""
    data = {"_target_": "epmq_cli.data.images.Npz", "path": str(folder / "images.npz")}
    shared = {"data": data, "classes": ["cat", "dog"], "templates": ["a photo of a {}"]}
    tasks = {f"task{index}": {"expert": str(folder / f"task{index}"), **shared} for index in range(experts)}
    content = {"_target_": "epmq_cli.data.suite.Suite", "name": f"random_{experts}", "family": "clip"}
    path = folder / "configs" / "suite" / f"random_{experts}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "base": str(folder / "base"), "tasks": tasks}))  # JSON is YAML
    return folder / "configs"


def measured(command: list[str], threads: int) -> Watched:
    """Runs a command and returns its measurements."""
    found = watched(command, {**os.environ, "OMP_NUM_THREADS": str(threads)})
    if found.status:
        raise subprocess.CalledProcessError(found.status, command)
    return found


def run(folder: Path, point: Point, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the metrics of one run with its wall seconds and its peaks."""
    configs, out = suite(folder, point.experts), folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    start = [sys.executable, "-m", "epmq_cli", "run"]
    if arguments.processes:
        start[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(point.processes)]
    device = "auto" if arguments.processes and arguments.device != "cpu" else arguments.device  # one GPU per process
    options = [f"suite=random_{point.experts}", f"calib.samples={point.samples}", f"device={device}"]
    options += [f"out={out}", "eval.stages=[]", "cache=false", f"guidance={arguments.guidance}", *arguments.overrides]
    threads = 1 if arguments.processes else arguments.threads
    found = measured([*start, "--config-dir", str(configs), *options], threads)
    metrics = json.loads((out / "metrics.json").read_text())
    weights = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((out / "checkpoint").glob("*.safetensors"))))
    described = {"device": metrics["environment"]["device_name"], "weights": weights.hexdigest()}
    on_device = [record["peak_device_bytes"] for record in metrics["stages"].values()]
    peak = max(on_device) if metrics["environment"]["device"].startswith("cuda") else None
    return {**vars(found), "stages": metrics["stages"], "peak_device": peak, **described}


def operations(size: str, point: Point, teaches: bool) -> float:
    """Counts multiplications and additions in the calibration's large products.

    Per token, the linears of a block cost 2 x 12 d^2 (ffn 4 d) for the student and again for the teacher. X'X costs
    d^2 for each of qkv, out and fc1, and (4 d)^2 for fc2. With a teacher, the drift's moments cost 2 d^2 + d^2 for qkv
    and fc1, and 4 d out for the parts of out and fc2.
    """
    width, inner, layers, _, image, patch = SIZES[size]
    tokens = point.experts * point.samples * ((image // patch) ** 2 + 1)
    forward = 2 * (4 * width * width + 2 * width * inner)
    moments = 3 * width * width + inner * inner
    drift = 6 * width * width + 4 * width * width + 4 * width * inner
    return float(tokens * layers * (forward * (1 + teaches) + moments + teaches * drift))


def exponent(points: list[Point], runs: list[dict[str, Any]], name: str) -> str:
    """Fits the log-log slope of time against experts or samples; empty if all points have the same number."""
    xs = [math.log(getattr(point, name)) for point in points]
    if len(set(xs)) < 2:
        return ""
    ys = [math.log(found["stages"]["calibrate and quantize"]["seconds"]) for found in runs]
    return f"calibration time grows with {name} to the power of {np.polyfit(xs, ys, 1)[0]:.2f}"


def teaches(arguments: argparse.Namespace) -> bool:
    """Returns whether the chosen guidance needs the teachers' own activations."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=["out=unused", f"guidance={arguments.guidance}", *arguments.overrides])
    return bool(build("guidance", cfg.guidance).teaches)


def refuse_shared(arguments: argparse.Namespace) -> None:
    """Exits if several processes would share a GPU."""
    needed, found = max(arguments.processes, default=1), torch.cuda.device_count()
    if (
        needed > 1
        and (arguments.device.startswith("cuda") or (arguments.device == "auto" and found))
        and needed > found
    ):
        sys.exit(f"--processes {needed} needs a GPU for each and this machine has {found}; use --device cpu")


def cells(point: Point, found: dict[str, Any], products: float, student: int, imports: int) -> list[str]:
    """Returns a table row; `products` is in operations, `student` and `imports` are in bytes."""
    seconds = {name: record["seconds"] for name, record in found["stages"].items()}
    peak, students = found["peak_device"], 1
    if peak is None:
        peak, students = found["peak"] - point.processes * imports, point.processes
    row = [str(part) for part in (point.experts, point.samples, point.processes)]
    row += [f"{found['wall']:.0f}", *(f"{seconds[name]:.1f}" for name in STAGES)]
    row += [f"{peak / 1e9:.2f}", f"{(peak - students * student) / 1e9:.2f}"]
    row.append(f"{products / seconds['calibrate and quantize'] / 1e9:.0f}")
    return row + floors(found["device"], point.processes, products, (point.experts + 1) * student)


def show(points: list[Point], runs: list[dict[str, Any]], arguments: argparse.Namespace, rows: list[list[str]]) -> None:
    """Prints the table."""
    on_device = runs[0]["peak_device"] is not None
    print(f"{arguments.size}, guidance {arguments.guidance}, {runs[0]['device']}, medians of {arguments.repeats}\n")
    columns = ["experts", "samples", "processes", "whole, s", *STAGES.values()]
    columns += ["device peak, GB" if on_device else "peak, GB", "above the student", "Gop/s"]
    columns += FLOORS if runs[0]["device"] in RATES else []
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    if on_device and runs[0]["device"] not in RATES:
        print(f"\nNo floors: the rates of {runs[0]['device']} are not known (floors.py).")
    if len(arguments.processes) > 1:
        kinds = {(point.experts, point.samples, found["weights"]) for point, found in zip(points, runs, strict=True)}
        same = len(kinds) * len(arguments.processes) == len(points)
        print(f"\nAny number of processes writes the same weights to the last byte: {'yes' if same else 'no'}.")


def main() -> None:
    """Parses the command line, runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8])
    parser.add_argument("--samples", type=int, nargs="+", default=[256])
    parser.add_argument("--processes", type=int, nargs="*", default=[])
    parser.add_argument("--size", choices=list(SIZES), default="b32")
    parser.add_argument("--guidance", default="feature")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/pipeline"))
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of the run")
    arguments = parser.parse_args()
    refuse_shared(arguments)
    teaching = teaches(arguments)
    folder = arguments.out.resolve() / arguments.size
    make(folder, arguments.size, max(arguments.experts))
    imports = measured([sys.executable, "-c", IMPORTS], 1).peak
    points = [Point(e, s, p) for p in arguments.processes or [1] for e in arguments.experts for s in arguments.samples]
    rounds = [[run(folder, point, arguments) for point in points] for _ in range(arguments.repeats)]
    runs = [sorted(found, key=lambda r: r["wall"])[(len(found) - 1) // 2] for found in zip(*rounds, strict=True)]
    student = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    products = [operations(arguments.size, point, teaching) for point in points]
    rows = [cells(*row, student, imports) for row in zip(points, runs, products, strict=True)]
    show(points, runs, arguments, rows)
    width, inner = SIZES[arguments.size][:2]
    block = 4 * (4 * width**2 + 2 * width * inner) / 1e6
    print(f"\nStudent {student / 1e9:.2f} GB and a block {block:.1f} MB in float32, for each process", end="")
    print("." if runs[0]["peak_device"] is not None else f"; {imports / 1e9:.2f} GB of imports for each are taken off.")
    for name in ("experts", "samples"):
        print(exponent(points, runs, name))


if __name__ == "__main__":
    main()
