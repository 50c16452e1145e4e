"""The cross table: every merge method x {dense, 4 bits} x guidance, from one sweep.

    python benchmarks/cross_table.py --run                                  # the built-in suite, by one multirun
    python benchmarks/cross_table.py --run --suite vision3 --config-dir benchmarks/vision3/configs
    python benchmarks/cross_table.py --out runs/cross_tiny                  # the table of a sweep that exists

A run that failed is listed by name, and the exit status is then 1. Options after -- go to `epmq run`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import correlation, mean, pstdev
from typing import Any

from epmq_cli.config.instantiate import conf_dir

GUIDANCE = ("merged", "expert", "feature")
QUANT = {"none": "dense", "gptq": "4 bits"}

FEWER = ("arcee_fusion", "nearswap", "nuslerp", "passthrough", "slerp")
"""Methods that merge one or two experts."""


def methods() -> list[str]:
    """The merge methods that need no further files and take several experts."""
    found = (path for path in (conf_dir() / "merge").glob("*.yaml") if "???" not in path.read_text())
    return sorted(path.stem for path in found if path.stem not in FEWER)


def sweep(arguments: argparse.Namespace) -> int:
    """Runs all combinations; the exit status."""
    command = [sys.executable, "-m", "epmq_cli", "run", "-m", f"suite={arguments.suite}"]
    if arguments.config_dir:
        command += ["--config-dir", str(arguments.config_dir)]
    axes = {"merge": arguments.merge or methods(), "quant": arguments.quant, "guidance": arguments.guidance}
    command += [f"{name}={','.join(values)}" for name, values in axes.items()]
    command += ["eval.stages=[quantized]", f"out={arguments.out}", *arguments.options]
    return subprocess.run(command, check=False).returncode


def cells(folder: Path) -> dict[tuple[str, str, str], float | None]:
    """The mean score of each combination of merge, quant and guidance; None for a run without metrics.json."""
    found: dict[tuple[str, str, str], float | None] = {}
    for path in sorted(folder.glob("*/.hydra/overrides.yaml")):
        values = dict(line[2:].split("=", 1) for line in path.read_text().splitlines())
        metrics = path.parents[1] / "metrics.json"
        content: dict[str, Any] = json.loads(metrics.read_text()) if metrics.is_file() else {}
        score = 100 * content["scores"]["average"]["quantized"] if content else None
        found[values["merge"], values["quant"], values["guidance"]] = score
    return found


def table(scores: dict[tuple[str, str, str], float | None]) -> str:
    """The table in Markdown, sorted by the last column."""
    given = {key[1:] for key in scores}
    columns = [column for quant in QUANT for guidance in GUIDANCE if (column := (quant, guidance)) in given]
    merges = sorted(
        {merge for merge, _, _ in scores}, key=lambda merge: (-(scores.get((merge, *columns[-1])) or 0), merge)
    )
    head = " | ".join(f"{QUANT[quant]}, {guidance}" for quant, guidance in columns)
    rows = [f"| merge | {head} |", f"|---|{'---|' * len(columns)}"]
    for merge in merges:
        values = [scores.get((merge, *column)) for column in columns]
        rows.append(f"| {merge} | {' | '.join('' if value is None else f'{value:.1f}' for value in values)} |")
    return "\n".join(rows)


def summary(scores: dict[tuple[str, str, str], float | None]) -> list[str]:
    """For each column the range, and how it goes with the merges themselves; merges without all scores are left out."""
    columns = sorted({key[1:] for key in scores})
    known = {key: score for key, score in scores.items() if score is not None}
    whole = sorted({key[0] for key in scores if all((key[0], *column) in known for column in columns)})
    lines = []
    for quant, guidance in columns:
        own, start, dense = (
            [known[merge, *column] for merge in whole]
            for column in ((quant, guidance), (quant, "merged"), ("none", guidance))
        )
        line = f"{QUANT[quant]}, {guidance}: {min(own):.1f} to {max(own):.1f}, standard deviation {pstdev(own):.2f}"
        if guidance != "merged":
            line += f", {mean(own) - mean(start):+.1f} over the merge"
            line += f", correlation with it {correlation(start, own):.2f}"
        if quant != "none":
            line += f", {mean(dense) - mean(own):.2f} below dense"
        lines.append(line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the sweep first; runs that are done are kept")
    parser.add_argument("--suite", default="tiny")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--merge", nargs="*", help="only these methods")
    parser.add_argument("--quant", nargs="*", default=list(QUANT))
    parser.add_argument("--guidance", nargs="*", default=list(GUIDANCE))
    parser.add_argument("--out", type=Path)
    parser.add_argument("options", nargs="*", help="further options of epmq run")
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path("runs") / f"cross_{arguments.suite}"
    status = sweep(arguments) if arguments.run else 0
    scores = cells(arguments.out)
    print(table(scores))
    if {(quant, guidance) for _, quant, guidance in scores} == set(product(QUANT, GUIDANCE)):
        print("", *summary(scores), sep="\n")
    failed = [" ".join(key) for key, score in scores.items() if score is None]
    if failed:
        print(f"\nfailed: {'; '.join(failed)}")
    return status or bool(failed)


if __name__ == "__main__":
    sys.exit(main())
