"""Measures what each part of feature guidance adds at 4, 3 and 2 bits, beside unquantized methods and the experts.

    make bench-quality
    python benchmarks/quality.py --suite vision3 --config-dir benchmarks/vision3/configs --bits 4 --seeds 0

One process measures a suite and reads its models once. Every row merges, calibrates and quantizes from the start and
scores the student. The student's weights equal those of its reloaded checkpoint (tests/checkpoint/test_write.py). The
table has medians over the seeds of the calibration samples, with the seconds of calibration. Below 3 bits, groups have
32 columns. Rows that refine share the training of the dense model; each counts its seconds.
Results under --out are reused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from epmq_cli.calibrate.progress import Account, WalkProgress
from epmq_cli.commands.hydra_app import quiet_libraries
from epmq_cli.config import instantiate
from epmq_cli.evaluate import metrics
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.progress import RunProgress
from epmq_cli.pipeline.refinement import Refiner

EPMQ = {"guidance": "expert"}
LAM = {**EPMQ, "guidance.lam": "0.001"}
ALPHA = {**LAM, "guidance.alpha": "1"}
RHO = {**ALPHA, "guidance.rho": "2"}
INTERCEPTS = {**RHO, "guidance.intercepts": "true"}
NORMS = {**INTERCEPTS, "guidance.norms": "true"}
BETA = {**NORMS, "guidance.beta": "1"}
EMBEDDINGS = {**BETA, "guidance.embeddings": "true"}
FEATURE = {"guidance": "feature", "guidance.heads": "never"}
VIEWS = {**FEATURE, "calib.views": "4"}
FEATCAL = {**NORMS, "guidance.alpha": "0.3", "guidance.lam": "0.01", "guidance.readout_weight": "0.01"}
ROWS: dict[str, dict[str, str]] = {
    "merge, dense": {"guidance": "merged", "quant": "none"},
    "RegMean, dense": {**EPMQ, "guidance.lam": "0", "quant": "none"},
    "FeatCal, dense": {**FEATCAL, "quant": "none"},
    "feature, dense": {**FEATURE, "quant": "none"},
    "RTN": {"guidance": "merged", "quant": "rtn"},
    "GPTQ": {"guidance": "merged"},
    "E-PMQ": EPMQ,
    "+ lam 0.001": LAM,
    "+ alpha 1": ALPHA,
    "+ rho 2": RHO,
    "+ intercepts": INTERCEPTS,
    "+ norms": NORMS,
    "+ beta 1": BETA,
    "+ embeddings": EMBEDDINGS,
    "+ readout": {**FEATURE, "guidance.safe": "false"},
    "+ safe = feature": FEATURE,
    "+ views": VIEWS,
    "+ refine": {**VIEWS, "refine": "distill"},
    "+ refine, packed too": {**VIEWS, "refine": "distill", "refine.packed_epochs": "20"},
    "+ refine by blocks": {**VIEWS, "refine": "blocks"},
    "+ both": {**VIEWS, "refine": "both"},
    "+ heads": {**FEATURE, "guidance.heads": "always"},
    "+ refine + heads": {**VIEWS, "guidance.heads": "always", "refine": "distill"},
    "+ both + heads": {**VIEWS, "guidance.heads": "always", "refine": "both"},
    "+ auto": {**FEATURE, **{f"guidance.{name}": "auto" for name in ("lam", "alpha", "beta", "rho")}},
}
"""The overrides of each row. From E-PMQ on, each row adds to the row before, up to `+ views`. Rows with `refine` add to
`+ views`, `+ heads` and `+ auto` to `+ safe = feature`."""


LATER = ("refine.packed_epochs", "guidance.heads")
"""The options of ROWS that do not change the refined dense model."""


class Refinements(RunProgress):
    """Keeps the refined dense model only."""

    def part(self, name: str | None) -> RunProgress:
        """The progress of the training of the dense model; others are not kept."""
        return RunProgress(self.folder / name if self.folder and name == "refine" else None)

    def of_walk(self, name: str, account: Account | None = None) -> WalkProgress:
        """Walks are not kept."""
        return WalkProgress(None, account)


class Session:
    """One suite with its models and the results so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.file: Path = arguments.out / f"{arguments.suite}.json"
        self.known: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.samples: dict[str, Any] = {}
        self.loaded = False

    def job(self, merge: str, overrides: dict[str, str]) -> steps.Job:
        """Returns the job of a row."""
        lines = [f"suite={self.arguments.suite}", f"merge={merge}", "out=unused", *self.arguments.overrides]
        if self.arguments.config_dir:
            lines.append(f"hydra.searchpath=[file://{self.arguments.config_dir.resolve()}]")
        with initialize_config_dir(str(instantiate.conf_dir()), version_base="1.3"):
            return make_job(compose("run", overrides=lines + [f"{k}={v}" for k, v in overrides.items()]))

    def load(self, job: steps.Job) -> None:
        """Reads models and tasks, and scores the experts."""
        self.models, self.model, self.dtype = steps.open_models(job)
        self.tasks = steps.prepare_tasks(job, self.model, self.models)
        if "experts" not in self.known:
            scores = steps.score_parts(RunContext.of(job), self.model, self.models, self.tasks)
            found = {stage: values(scores[stage]) for stage in ("experts", "base")}
            self.keep("experts", {"accuracy": average(job, found["experts"]), "base": average(job, found["base"])})
        self.loaded = True

    def keep(self, key: str, entry: dict[str, Any]) -> None:
        """Adds a result and writes all results to the file."""
        self.known[key] = entry
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.known, indent=1))

    def calibration(self, job: steps.Job) -> guide.TeacherOutputs:
        """Returns the batches of a seed with the experts' outputs."""
        key = f"{job.calib.samples} {job.seed} {guide.solves_heads(job)}"
        if key not in self.samples:
            drawn = steps.calibration_batches(job, self.models.base.path)
            self.samples = {key: guide.run_teachers(RunContext.of(job), self.model, self.models.source, drawn)}
        found: guide.TeacherOutputs = self.samples[key]
        return found

    def key(self, row: str, merge: str, bits: str, seed: int) -> str:
        """Returns the name of a result in the file."""
        return f"{merge} {'dense' if row.endswith('dense') else bits} {row} {seed}"

    def measure(self, row: str, merge: str, bits: str, seed: int) -> dict[str, Any]:
        """Returns the accuracy in % and the seconds of calibration of one row."""
        key = self.key(row, merge, bits, seed)
        if key not in self.known:
            group = {} if row.endswith("dense") else {"bits": bits, "group_size": "32" if float(bits) < 3 else "64"}
            job = self.job(merge, {**ROWS[row], **group, "seed": str(seed)})
            if not self.loaded:
                self.load(self.job(merge, {**ROWS[row], **group, "seed": "0"}))  # the same test samples for all seeds
            taught = self.calibration(job)
            copy_into(self.model, self.base_state)
            merged = LazyMerge(self.models.source, job.merge, self.dtype)
            copy_into(self.model, merged)
            progress = self.refinement(merge, row, seed)
            start, context = time.perf_counter(), replace(RunContext.of(job), progress=progress)
            refiner = Refiner(context, self.model, taught.batches, self.tasks, self.models.source)
            refined = refiner.dense(merged)
            trained = progress.value("seconds", lambda: time.perf_counter() - start)
            start = time.perf_counter()
            calibrated = guide.calibrate(refined.context, self.model, refined.batches, self.tasks, refined.anchor)
            refiner.packed(calibrated.walk, self.dtype)
            tasks = guide.solve_heads(context, self.model, taught, self.tasks, calibrated.guidance)
            seconds = trained + time.perf_counter() - start
            scored = steps.score(context, self.model, tasks, "quantized", self.models.base.path)["quantized"]
            scores = values(scored)
            entry = {"accuracy": average(job, scores), "seconds": seconds, "tasks": scores}
            self.keep(key, entry | refiner.entries | self.further(context))
            print(f"{key}: {average(job, scores):.2f}, {seconds:.1f} s", file=sys.stderr, flush=True)
        found_entry: dict[str, Any] = self.known[key]
        return found_entry

    def further(self, context: RunContext) -> dict[str, Any]:
        """Returns further results of a row, for which the model now has the weights."""
        return {}

    def refinement(self, merge: str, row: str, seed: int) -> RunProgress:
        """Returns the progress that keeps the refined dense model, which rows and bit widths share."""
        own = {name: value for name, value in ROWS[row].items() if name not in LATER}
        if own.get("refine") not in ("distill", "both"):
            return RunProgress()
        own["refine"] = "distill"
        name = " ".join([merge, str(seed), *(f"{key}={value}" for key, value in sorted(own.items()))])
        return Refinements(self.file.with_suffix("") / name)

    @property
    def base_state(self) -> dict[str, Tensor]:
        """The original tensors that are not merged."""
        if not hasattr(self, "_state"):
            self._state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self._state = {name: t for name, t in self._state.items() if name not in self.models.source.names}
        return self._state


def values(scores: dict[str, metrics.Score]) -> dict[str, float]:
    """Returns the scores without their errors."""
    return {task: score.value for task, score in scores.items()}


def average(job: steps.Job, scores: dict[str, float]) -> float:
    """Returns the average over tasks, in % except for perplexities."""
    metric = next(iter(job.suite.metrics.values()))
    mean = metrics.average(list(scores.values()), metric)
    return mean if metric == metrics.PERPLEXITY else 100 * mean


def table(session: Session, arguments: argparse.Namespace) -> None:
    """Measures missing results, column by column, and prints a Markdown table."""
    columns = [(merge, bits) for merge in arguments.merges for bits in arguments.bits]
    found = {
        (row, column, seed): session.measure(row, *column, seed)
        for seed in arguments.seeds
        for column in columns
        for row in arguments.rows
    }
    print(f"{arguments.suite}: base {session.known['experts']['base']:.1f}, ", end="")
    print(f"experts {session.known['experts']['accuracy']:.1f}; in brackets seconds of calibration\n")
    print("| | " + " | ".join(f"{merge}, {bits} bits" for merge, bits in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for row in arguments.rows:
        cells = []
        for column in columns:
            entries = [found[row, column, seed] for seed in arguments.seeds]
            accuracy, seconds = (
                statistics.median(entry[part] for entry in entries) for part in ("accuracy", "seconds")
            )
            cells.append(f"{accuracy:.1f} ({seconds:.1f})")
        print(f"| {row} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="tiny")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--merges", nargs="+", default=["task_arithmetic"])
    parser.add_argument("--bits", nargs="+", default=["4", "3", "2"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of every run")
    arguments = parser.parse_args()
    quiet_libraries()
    with torch.no_grad():  # not inference_mode: refinement trains the model
        table(Session(arguments), arguments)


if __name__ == "__main__":
    main()
