"""Chooses lam, alpha, beta and rho of feature guidance for each suite by the held-out divergences on the other suites.

    python benchmarks/defaults.py --measure tiny pair vision3 vision6       # needs EPMQ_VISION3_DATA
    python benchmarks/defaults.py --measure trio text4 smollm               # needs EPMQ_TEXT4_DATA
    python benchmarks/defaults.py                                           # the table over all suites measured

The divergence is that of `auto`: T^2 KL of the outputs from the experts' at T = 2, on every fifth calibration sample,
after an unquantized walk on the other four. A suite's row compares three settings at 4 bits: the shipped one; the one
with the lowest geometric mean of the divergences on the other suites; and the one with the lowest divergence on the
suite itself. Heads are not solved. Labels are used for the scores only. Results under --out are reused.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import quality

from epmq_cli.calibrate.activations.batch_invariant import batch_invariant
from epmq_cli.calibrate.student import Student
from epmq_cli.commands.hydra_app import quiet_libraries
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import calibration as guide

MERGE = "task_arithmetic"
NAMES = ("lam", "alpha", "beta", "rho")
Values = tuple[float, float, float, float]
CELLS = ("", ", divergence", ", score")
SHIPPED: Values = (0.001, 1, 1, 2)
SETTINGS: list[Values] = [
    *((lam, 1, 1, 2) for lam in (0.001, 0.0001, 0.0003, 0.003, 0.01, 0.03)),
    *((lam, 1, beta, 2) for beta in (0.5, 0) for lam in (0.0003, 0.001, 0.003, 0.01)),
    *((lam, 0.7, beta, 2) for beta in (1, 0.5) for lam in (0.0003, 0.001, 0.003, 0.01)),
    *((0.01, 0.3, beta, 2) for beta in (0, 0.5)),
    *((lam, 1, 1, rho) for rho in (1, 3) for lam in (0.0003, 0.001, 0.003)),
]


@dataclass(frozen=True)
class Mixture:
    """A suite, with the tasks that are left out and further overrides."""

    suite: str
    folder: str | None
    overrides: tuple[str, ...] = ()


MIXTURES = {
    "tiny": Mixture("tiny", None),
    "vision3": Mixture("vision3", "vision3"),
    "vision6": Mixture("vision6", "vision3"),
    "text4": Mixture("text4", "text4", ("calib.samples=128", "eval.samples=500")),
    "smollm": Mixture("smollm", "smollm", ("calib.samples=16", "calib.batch_size=8", "eval.samples=12")),
    "pair": Mixture("vision3", "vision3", ("~suite.tasks.notmnist", "~suite.tasks.omniglot", "calib.samples=64")),
    "trio": Mixture("text4", "text4", ("~suite.tasks.trec", "calib.samples=64", "eval.samples=500")),
}
"""Other tasks together, other numbers of tasks and of samples."""


def session_of(name: str, out: Path) -> quality.Session:
    """Returns the session of a mixture."""
    mixture, here = MIXTURES[name], Path(__file__).parent
    return quality.Session(
        argparse.Namespace(
            suite=mixture.suite,
            config_dir=mixture.folder and here / mixture.folder / "configs",
            out=out / name,
            overrides=list(mixture.overrides),
        )
    )


def label(values: Values) -> str:
    """Returns the name of a setting."""
    return " ".join(f"{name} {value:g}" for name, value in zip(NAMES, values, strict=True))


def measure_all(session: quality.Session, seed: int) -> None:
    """Measures the held-out divergence of every setting that the session does not know."""
    job = session.job(MERGE, {**quality.FEATURE, "quant": "none", "seed": str(seed)})
    missing = [values for values in SETTINGS if f"divergence {label(values)} {seed}" not in session.known]
    if not missing:
        return
    if not session.loaded:
        session.load(job)
    batches, model = session.calibration(job).batches, session.model
    copy_into(model, session.base_state)
    merged = LazyMerge(session.models.source, job.merge, session.dtype)
    copy_into(model, merged)
    student = Student(model, job.family, guide.references(job, model, merged), job.guidance, session.dtype)
    with torch.inference_mode(), batch_invariant(model):
        divergence = guide.HeldOutDivergence(student, batches, session.tasks)
        for values in missing:
            found = divergence(replace(job.guidance, **dict(zip(NAMES, values, strict=True))))  # type: ignore[arg-type]
            session.keep(f"divergence {label(values)} {seed}", {"divergence": found})
            print(f"{session.file.parent.name}: {label(values)}: {found:.4f}", file=sys.stderr, flush=True)


def divergences_of(session: quality.Session, seeds: list[int]) -> dict[Values, float]:
    """Returns the geometric means over the seeds of the divergences, relative to those of the shipped setting."""
    known = {
        values: [session.known[f"divergence {label(values)} {seed}"]["divergence"] for seed in seeds]
        for values in SETTINGS
    }
    logs = {
        values: [math.log(own / shipped) for own, shipped in zip(found, known[SHIPPED], strict=True)]
        for values, found in known.items()
    }
    return {values: math.exp(statistics.mean(found)) for values, found in logs.items()}


def score(session: quality.Session, values: Values, seeds: list[int]) -> float:
    """Returns the median score at 4 bits of a setting: an accuracy in %, or a perplexity."""
    options = {f"guidance.{name}": f"{value:g}" for name, value in zip(NAMES, values, strict=True)}
    row = label(values)
    quality.ROWS[row] = {**quality.FEATURE, **options}
    found: list[Any] = [session.measure(row, MERGE, "4", seed)["accuracy"] for seed in seeds]
    return statistics.median(found)


def table(names: list[str], out: Path, seeds: list[int]) -> None:
    """Prints one row for each suite."""
    sessions = {name: session_of(name, out) for name in names}
    divergences = {name: divergences_of(session, seeds) for name, session in sessions.items()}
    heads = ("suite", "shipped", *(f"chosen {where}{cell}" for where in ("on the others", "here") for cell in CELLS))
    print(f"| {' | '.join(heads)} |")
    print("|---" * 8 + "|")
    for name, session in sessions.items():
        others = [divergences[other] for other in names if MIXTURES[other].suite != MIXTURES[name].suite]
        mean = {values: math.prod(found[values] for found in others) ** (1 / len(others)) for values in SETTINGS}
        chosen, own = min(SETTINGS, key=mean.__getitem__), min(SETTINGS, key=divergences[name].__getitem__)
        cells = [f"{score(session, SHIPPED, seeds):.1f}"]
        for values in (chosen, own):
            cells += [label(values), f"{divergences[name][values]:.3f}", f"{score(session, values, seeds):.1f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print("\n| setting | " + " | ".join(names) + " | geometric mean |\n" + "|---" * (len(names) + 2) + "|")
    for values in sorted(SETTINGS, key=lambda values: math.prod(divergences[name][values] for name in names)):
        found = [divergences[name][values] for name in names]
        print(
            f"| {label(values)} | "
            + " | ".join(f"{value:.3f}" for value in [*found, statistics.geometric_mean(found)])
            + " |"
        )


def main() -> None:
    """Parses the command line, measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", default=[], choices=list(MIXTURES), metavar="SUITE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    arguments = parser.parse_args()
    quiet_libraries()
    for name in arguments.measure:
        session = session_of(name, arguments.out)
        for seed in arguments.seeds:
            measure_all(session, seed)
    if not arguments.measure:
        names = [name for name in MIXTURES if any((arguments.out / name).glob("*.json"))]
        with torch.no_grad():
            table(names, arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
