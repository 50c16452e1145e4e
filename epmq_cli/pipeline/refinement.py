"""The step of `epmq run` that refines the calibrated model before it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.config import instantiate
from epmq_cli.data.batching import Batch, Batches, size
from epmq_cli.data.held_out import check_enough, split_held_out
from epmq_cli.evaluate.score import ScoredTask
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline.calibration import Anchor, calibrate, summary
from epmq_cli.pipeline.context import RunContext
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.refine.distill import Distill, own
from epmq_cli.refine.soft_labels import SoftLabels
from epmq_cli.refine.training import Examples, Student, Training


@dataclass(frozen=True)
class Refined:
    """A refined model in place of the merge: the tensors that quantization approximates."""

    source: MergeSource
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        """The refined tensor of this name."""
        return self.tensors[name]


@dataclass(frozen=True)
class Refinement:
    """What follows the refinement: `context` and `anchor` of the walk that quantizes, and entries of metrics.json."""

    context: RunContext
    anchor: Anchor
    entries: Mapping[str, Any]


def refine(
    context: RunContext, model: nn.Module, batches: Batches, tasks: Sequence[ScoredTask], merged: LazyMerge
) -> Refinement:
    """Calibrates the merged model without quantizing it, on four fifths of the samples, and trains the result. `model`
    then holds the refined weights.

    If training does not lower the loss on the last fifth, the model is the merged one again, and the refinement does
    not change the run.
    """
    job, distill, progress = context.job, context.job.refine, context.progress.part("refine")
    if not isinstance(distill, Distill):
        return Refinement(context, merged, {})
    for task, group in batches.items():
        check_enough(task, group, "refine=distill")
    entries: dict[str, Any] = {}
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}

    def train() -> dict[str, Tensor]:
        parts = {task: split_held_out(group) for task, group in batches.items()}
        fitted, held = ({task: pair[index] for task, pair in parts.items()} for index in (0, 1))
        fitted_examples = _examples(context, model, fitted, tasks, merged.source, distill.views)
        held_examples = _examples(context, model, held, tasks, merged.source, 1)
        copy_into(model, before)
        dense = replace(context, job=replace(job, quantizer=NoQuantizer()), progress=progress)
        full = {task: [batch for batch in group if size(batch)] for task, group in fitted.items()}
        calibrated = calibrate(dense, model, full, tasks, merged)
        start = {name: tensor.clone() for name, tensor in model.named_parameters()}
        student = Student(
            model=model,
            family=job.family,
            names=distill.names(model, merged.source.names),
            fitted=fitted_examples,
            held=held_examples,
            heads={task.name: own(task.head) for task in tasks},
            weights={task.name: job.guidance.factor(task.name) for task in tasks},
            micro=context.micro,
            seed=job.seed,
        )
        trials, best = distill.train(Training(student, distill.settings(job.device)), progress.folder)
        found = [{**asdict(trial), "best": trial.best} for trial in trials]
        measured = {"refine": {"trials": found, "refined": bool(best)}, "guidance": summary(job, calibrated)}
        entries.update(progress.value("entries", lambda: measured))  # before the tensors, without which training runs
        return start | best if best else {}

    tensors = progress.tensors("tensors", job.device, train)
    entries = entries or progress.value("entries", dict)
    if not tensors:
        copy_into(model, before)
        return Refinement(context, merged, {"refine": entries["refine"]})
    copy_into(model, tensors)
    guided = replace(context, job=replace(job, guidance=_asymmetric(job.guidance)))
    return Refinement(guided, Refined(merged.source, merged.dtype, tensors), entries)


def _examples(
    context: RunContext,
    model: nn.Module,
    batches: Batches,
    tasks: Sequence[ScoredTask],
    source: MergeSource,
    views: int,
) -> Examples:
    """The batches of each task with the outputs of its expert for each view. Overwrites the model's merged tensors."""
    job, examples = context.job, {}
    assert isinstance(job.refine, Distill)
    for task in tasks:
        copy_into(model, source.model(task.name))
        labels = partial(job.refine.labels, model, job.family, own(task.head))

        def label(batch: Batch, labels: Callable[[Batch, int], SoftLabels] = labels) -> SoftLabels:
            return context.micro.run(partial(labels, batch), count=size(batch))

        examples[task.name] = job.refine.labelled(batches[task.name], views, job.seed, label)
    return examples


def _asymmetric(guidance: Guidance) -> Guidance:
    """`guidance=asymmetric`, which quantizes towards a model's own outputs, with the given guidance's heads and
    weights."""
    node = OmegaConf.load(instantiate.conf_dir() / "guidance" / "asymmetric.yaml")
    assert isinstance(node, DictConfig)
    asymmetric: Guidance = instantiate.build("guidance", node)
    return replace(asymmetric, heads=guidance.heads, weights=guidance.weights, task_weight=guidance.task_weight)
