"""Merges x methods x bits of one suite in one table: what E-PMQ adds to plain quantization.

    python benchmarks/compare.py --suite tiny
    python benchmarks/compare.py --suite text4 --config-dir benchmarks/text4/configs

Every number is read from the metrics.json of an `epmq run`, scored on the packed checkpoint as reloaded from disk.
Runs that are there already under --out are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

MERGES = ("task_arithmetic", "ties")
METHODS = {
    "RTN": ("quant=rtn", "guidance=merged"),
    "GPTQ": ("quant=gptq", "guidance=merged"),
    "E-PMQ": ("quant=gptq", "guidance=expert"),
}


def main() -> None:
    """Runs what is missing and prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="tiny")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--out", type=Path, help="default runs/compare/<suite>")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration samples; medians are shown"
    )
    parser.add_argument("overrides", nargs="*", help="further overrides of every run")
    arguments = parser.parse_args()
    print("| merge | bits | base | experts | merged, dense | " + " | ".join(METHODS) + " | E-PMQ - GPTQ |")
    print("|---" * (6 + len(METHODS)) + "|")
    for merge in MERGES:
        whole = scores(arguments, merge, arguments.bits[0], "RTN", arguments.seeds[0], every_stage=True)
        for bits in arguments.bits:
            cells = {}
            for method in METHODS:
                seeds = arguments.seeds[:1] if method == "RTN" else arguments.seeds  # RTN looks at no sample
                every = [scores(arguments, merge, bits, method, seed)["quantized"] for seed in seeds]
                cells[method] = 100 * statistics.median(every)
            fixed = [f"{100 * whole[stage]:.1f}" for stage in ("base", "experts", "merged")]
            row = [merge, str(bits), *fixed, *(f"{value:.1f}" for value in cells.values())]
            print("| " + " | ".join([*row, f"{cells['E-PMQ'] - cells['GPTQ']:+.1f}"]) + " |", flush=True)


def scores(
    arguments: argparse.Namespace,
    merge: str,
    bits: int,
    method: str,
    seed: int,
    every_stage: bool = False,
) -> dict[str, float]:
    """The average accuracies of one run by stage."""
    parent: Path = arguments.out or Path("runs/compare") / arguments.suite
    folder = parent / f"{merge}-{method}-{bits}-{seed}{'-all' if every_stage else ''}"
    if not (folder / "metrics.json").is_file():
        stages = "base,experts,merged,quantized" if every_stage else "quantized"
        command = [
            sys.executable,
            "-m",
            "epmq_cli",
            "run",
            f"suite={arguments.suite}",
            f"merge={merge}",
            f"bits={bits}",
        ]
        command += [*METHODS[method], f"seed={seed}", f"eval.stages=[{stages}]", f"out={folder}", *arguments.overrides]
        if arguments.config_dir:
            command += ["--config-dir", str(arguments.config_dir)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    average: dict[str, float] = metrics["scores"]["average"]
    return average


if __name__ == "__main__":
    main()
