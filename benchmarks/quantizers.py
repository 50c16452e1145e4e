"""Compares quantizers by how far their outputs are from those of the unquantized model with the same guidance.

    python benchmarks/quantizers.py --bits 4 3 2 --seeds 0 1 2 --rows "" quant.act_order=true quant=autoround
    python benchmarks/quantizers.py --rows guidance=merged "quant=gptaq guidance=gptaq" guidance=asymmetric

A row is a set of overrides. The table has means over the seeds: the loss that quantization adds to the objective, over
linears; the KL divergence (x 1000) on test samples of each task; the accuracy in %; processor seconds of calibration.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quality import Session

from epmq_cli.commands.hydra_app import quiet_libraries
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline.context import RunContext

UNQUANTIZED = ("guidance", "calib", "merge")
"""The groups of options that the unquantized model shares with a row."""
BATCH = 100  # samples


@torch.inference_mode()
def outputs(session: Session, most: int) -> dict[str, Tensor]:
    """Returns the log-probabilities (samples, classes) of each task's first test samples."""
    found, family = {}, session.family
    for task in session.tasks:
        count, parts = min(most, len(task.samples)), []
        for start in range(0, count, BATCH):
            inputs = task.samples.take(list(range(start, min(count, start + BATCH)))).inputs
            rows = family.features(session.model, task.collate(list(inputs)))
            parts.append(family.logits(session.model, rows, task.head).double())
        found[task.name] = torch.cat(parts).log_softmax(-1)
    return found


def measure(session: Session, overrides: dict[str, str], most: int) -> tuple[dict[str, Tensor], float, float]:
    """Returns the outputs of a calibrated model, the loss that its quantization adds, and processor seconds."""
    job = session.job(overrides.pop("merge", "task_arithmetic"), overrides)
    session.family = job.family
    if not session.loaded:
        session.load(job)
    taught = session.calibration(job)
    copy_into(session.model, session.base_state)
    merged = LazyMerge(session.models.source, job.merge, session.dtype)
    copy_into(session.model, merged)
    start, context = time.process_time(), RunContext.of(job)
    walk = guide.calibrate(context, session.model, taught.batches, session.tasks, merged).walk
    seconds = time.process_time() - start
    added = [each.loss - each.loss_target for each in walk.records if each.loss is not None]
    return outputs(session, most), statistics.fmean(added) if added else 0.0, seconds


def divergence(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Returns the KL divergence of other from one, mean of tasks."""
    return statistics.fmean(float((one[t].exp() * (one[t] - other[t])).sum(-1).mean()) for t in one)


def right(session: Session, found: dict[str, Tensor]) -> float:
    """Returns the accuracy in %, mean of tasks."""
    labels = {task.name: torch.as_tensor(task.samples.labels) for task in session.tasks}
    shares = [(p.argmax(-1) == labels[task][: len(p)]).double().mean() for task, p in found.items()]
    return 100 * float(torch.stack(shares).mean())


def compare(session: Session, arguments: argparse.Namespace, row: str, bits: str) -> list[float]:
    """Returns the means over the seeds of a row's columns."""
    given, found = dict(part.split("=", 1) for part in row.split()), []
    for seed in arguments.seeds:
        group = {"bits": bits, "group_size": "32" if float(bits) < 3 else "64", "seed": str(seed)}
        shared = {name: value for name, value in given.items() if name.split(".")[0] in UNQUANTIZED}
        guidance = "merged" if "gptaq" in row else shared.get("guidance", "feature")
        dense = {**shared, "guidance": guidance, "quant": "none", "seed": str(seed)}
        wanted = measure(session, dense, arguments.samples)[0]
        own, added, seconds = measure(session, {**given, **group}, arguments.samples)
        found.append((added, 1000 * divergence(wanted, own), right(session, own), seconds))
    return [statistics.fmean(column) for column in zip(*found, strict=True)]


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="tiny")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--bits", nargs="+", default=["4", "3", "2"])
    parser.add_argument("--rows", nargs="+", default=["", "quant.act_order=true", "quant=autoround"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=600, help="test samples of a task")
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of every run")
    arguments: Any = parser.parse_args()
    arguments.out = Path("runs/quantizers")
    quiet_libraries()
    session = Session(arguments)
    print("| | bits | added loss | KL | accuracy | seconds |\n|---|---|---|---|---|---|")
    for row in arguments.rows:
        for bits in arguments.bits:
            added, kl, accuracy, seconds = compare(session, arguments, row, bits)
            cells = [row or "gptq", bits, f"{added:.3g}", f"{kl:.1f}", f"{accuracy:.1f}", f"{seconds:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
