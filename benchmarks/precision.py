"""Measures the error of the unquantized optimum W* against float64 when moments or linears use narrower number types.

    python benchmarks/precision.py
    python benchmarks/precision.py --suite text4 --config-dir benchmarks/text4/configs
    python benchmarks/precision.py --device cuda

For every group of linears in the blocks, it captures the inputs of the merged model and of the experts on the
calibration samples and solves the objective of feature guidance for W*. The rows of the moments are float64, float32,
TF32 (10 bits of mantissa) or BF16 (7 bits). For TF32 and BF16, rows are rounded and products are summed in float32, as
on tensor cores. No tensor core is used, not even on a GPU. In further rows, only the sums of the drift have BF16 rows,
or the linears of the forward passes, of the experts alone or of all models, compute in bfloat16 and moments in float32.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from epmq_cli.calibrate.activations.hidden_state import inputs
from epmq_cli.calibrate.moments import Measure, real_tokens, task_weight
from epmq_cli.calibrate.objective import Objective
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.config.instantiate import conf_dir
from epmq_cli.data.batching import Batch
from epmq_cli.families.structure import Linears
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.models.fast_linears import FastLinear, fast_linears
from epmq_cli.models.weights import copy_into, swapped_weights
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job


def rounded(bits: int) -> Callable[[Tensor], Tensor]:
    """Returns a function that rounds float32 to nearest with `bits` of its 23 bits of mantissa."""
    drop = 23 - bits

    def convert(rows: Tensor) -> Tensor:
        whole = rows.float().contiguous().view(torch.int32)
        return ((whole + (1 << (drop - 1)) - 1 + (whole >> drop & 1)) >> drop << drop).view(torch.float32)

    return convert


Captured = dict[str, dict[str, Tensor]]
"""task -> first linear of a group -> its rows (tokens, width)."""

TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": Tensor.double,
    "float32": Tensor.float,
    "TF32": rounded(10),
    "BF16": rounded(7),
}


class NarrowMeasure(Measure):
    """Rounds rows to BF16 for the drift's product with the inputs alone."""

    def _add_part(self, weighted: Tensor, part: Tensor, weights: Tensor | None) -> None:
        super()._add_part(TYPES["BF16"](weighted), TYPES["BF16"](part), weights)


class NarrowLinear(FastLinear):
    """A linear whose product is in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the outputs (..., out) in float32."""
        product = torch.nn.functional.linear(input.bfloat16(), self.weight.bfloat16()).float()
        return product if self.bias is None else product + self.bias


def captured(job: steps.Job, model: torch.nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Captures the rows (tokens, width) that reach the first linear of each group in the blocks."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    stack = job.family.stacks(model)[0]
    names = [block.name(s.names[0]) for block in stack.blocks for s in block.steps if isinstance(s, Linears)]
    for batch in batches:
        reached = inputs([model.get_submodule(name) for name in names], partial(job.family.features, model, batch))
        for name, rows in zip(names, reached, strict=True):
            found[name].append(real_tokens(rows, stack.mask(batch)))
    return {name: torch.cat(rows) for name, rows in found.items()}


def target(
    anchor: Affine,
    rows: list[tuple[Tensor, Tensor, Affine]],
    lam: float,
    convert: Callable[[Tensor], Tensor],
    kind: type[Measure] = Measure,
) -> Tensor:
    """Solves for W* (out, in) from the inputs of the student and of each expert."""
    objective = Objective(anchor, lam, intercepts=anchor.bias is not None)
    for own, taught, expert in rows:
        measure = kind()
        for x, e in zip(own.split(1600), taught.split(1600), strict=True):
            measure.add_drift(convert(x), convert(e - x), None)
        moments = measure.moments(expert.weight)
        objective.add(moments, expert, task_weight(moments.norm, moments.tokens, "frobenius"))
    return objective.closed().solution().weight


def opened(arguments: argparse.Namespace) -> steps.Job:
    """Returns the job of the chosen suite."""
    overrides = [f"suite={arguments.suite}", f"device={arguments.device}", "out=runs/precision"]
    if arguments.config_dir:
        overrides.append(f"hydra.searchpath=[{arguments.config_dir.resolve()}]")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return make_job(compose("run", overrides=overrides))


@torch.inference_mode()
def captured_of_all(
    job: steps.Job,
    model: torch.nn.Module,
    models: SuiteModels,
    drawn: dict[str, list[Batch]],
    kind: type[FastLinear],
) -> tuple[Captured, Captured]:
    """Captures the rows of the student and of each expert on the tasks' samples, with linears of this kind."""
    own, taught = {}, {}
    with fast_linears(model, kind):
        for task, batches in drawn.items():
            own[task] = captured(job, model, batches)
            with swapped_weights(model, dict(models.source.model(task))):
                taught[task] = captured(job, model, batches)
    return own, taught


def rows(
    name: str, students: Captured, teachers: Captured, experts: list[Affine]
) -> list[tuple[Tensor, Tensor, Affine]]:
    """The rows of a group for each task, with the expert's linear."""
    return [(students[task][name], teachers[task][name], own) for task, own in zip(students, experts, strict=True)]


def relative_errors(
    job: steps.Job, model: torch.nn.Module, models: SuiteModels, drawn: dict[str, list[Batch]], lam: float
) -> dict[str, list[float]]:
    """Returns the error of W* by row type and group; the model must hold the merged weights."""
    own, taught = captured_of_all(job, model, models, drawn, FastLinear)
    narrow_own, narrow_taught = captured_of_all(job, model, models, drawn, NarrowLinear)
    errors: dict[str, list[float]] = defaultdict(list)
    for name in next(iter(own.values())):
        anchor = Affine(model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias"))
        experts = [
            Affine(*(models.source.expert(task, f"{name}.{part}").to(job.device) for part in ("weight", "bias")))
            for task in own
        ]
        exact = rows(name, own, taught, experts)
        targets = {kind: target(anchor, exact, lam, convert) for kind, convert in TYPES.items()}
        targets["BF16 in the drift's sums"] = target(anchor, exact, lam, Tensor.float, NarrowMeasure)
        targets["linears of experts in BF16"] = target(
            anchor, rows(name, own, narrow_taught, experts), lam, Tensor.float
        )
        targets["all linears in BF16"] = target(
            anchor, rows(name, narrow_own, narrow_taught, experts), lam, Tensor.float
        )
        for kind, found in targets.items():
            errors[kind].append(float((found - targets["float64"]).norm() / targets["float64"].norm()))
    return errors


def main() -> None:
    """Prints the median and the largest error over all groups of linears."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="tiny")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--lam", type=float, default=0.001)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    job = opened(arguments)
    models, model, dtype = steps.open_models(job)
    drawn = steps.calibration_batches(job, models.base.path)
    copy_into(model, LazyMerge(models.source, job.merge, dtype))
    errors = relative_errors(job, model, models, drawn, arguments.lam)
    groups = len(errors["float64"])
    print(f"{arguments.suite}, {groups} groups of linears, lam {arguments.lam}, {job.device}, relative error of W*\n")
    print("| rows | median | largest |\n|---|---|---|")
    for kind, found in errors.items():
        print(f"| {kind} | {sorted(found)[len(found) // 2]:.1e} | {max(found):.1e} |")


if __name__ == "__main__":
    main()
