"""How far the models of a run are from the experts, without labels: KL of their outputs, and how often the most likely
answer is the expert's; of embeddings their cosine. The samples are of the test splits, which calibration does not
see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.checkpoint.rounded_inputs import rounded_inputs
from epmq_cli.data.batching import ANSWERS, Batch, without
from epmq_cli.data.sampling import batches
from epmq_cli.evaluate.score import ScoredTask
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.fast_linears import fast_linears
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.output_divergence import TOP
from epmq_cli.quantize.formats.format import DenseWeight, QuantizedWeight
from epmq_cli.quantize.mixed_precision import formats_of
from epmq_cli.refine.soft_labels import Outputs, SoftLabels, outputs
from epmq_cli.runtime import distributed

SAMPLES = 64  # of each task, evenly over its test samples
TOKENS = 1 << 14  # at most, of language models

Compared = Mapping[str, Sequence[tuple[Batch, SoftLabels]]]
"""Batches of each task with its expert's outputs."""


@dataclass
class Agreement:
    """The outputs of the experts, and the comparisons with them by stage and task. Only the main process compares."""

    context: RunContext
    model: nn.Module
    experts: Compared
    stages: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, context: RunContext, model: nn.Module, tasks: Sequence[ScoredTask], source: MergeSource) -> Agreement:
        """Runs each expert on samples of its task. Overwrites the model's merged tensors. `tasks`: empty if the experts
        have other layers than the model."""
        experts: dict[str, list[tuple[Batch, SoftLabels]]] = {}
        for task in tasks if context.job.evaluation.stages and distributed.is_main() else ():
            copy_into(model, source.model(task.name))
            experts[task.name] = list(_outputs_of(context, model, task))
        return cls(context, model, experts)

    def measure(
        self,
        stage: str,
        tasks: Sequence[ScoredTask],
        weights: Mapping[str, QuantizedWeight | DenseWeight] | None = None,
    ) -> None:
        """Compares the model, and the heads of the tasks, with the experts. `weights`: of linears that round their
        inputs as in a score of the checkpoint."""
        job = self.context.job
        rounds = any(format.activations != "none" for format in formats_of(job.quantizer))
        rounds = rounds and job.exporter.packs and job.evaluation.round_inputs
        # the weights are in files, and other processes may be ahead of the main one, which writes them
        packed = (weights or {}) if rounds and self.experts else {}
        formats = {name: weight.format for name, weight in packed.items() if isinstance(weight, QuantizedWeight)}
        rounded = {name: format for name, format in formats.items() if format.activations != "none"}
        with rounded_inputs(self.model, rounded):
            self.stages[stage] = {task.name: self._measured(task) for task in tasks if self.experts.get(task.name)}

    @property
    def entry(self) -> dict[str, Any]:
        """The entry of metrics.json, by task and stage."""
        measured = [task for task, batches in self.experts.items() if batches]
        return {task: {stage: found[task] for stage, found in self.stages.items()} for task in measured}

    @torch.inference_mode()
    def _measured(self, task: ScoredTask) -> dict[str, float]:
        """`kl` in nats, the mean over samples or tokens, and the share `top1`; without the share for numbers. Of
        embeddings the mean `cosine`."""
        sums = torch.zeros(3, dtype=torch.float64)
        for batch, labels in self.experts[task.name]:
            logits = _logits(self.context, self.model, batch, task)
            parts = [labels.divergence(logits, 1.0), labels.agreements(logits)]
            sums += torch.stack([*(part.double().sum().cpu() for part in parts), torch.tensor(float(len(logits)))])
        kl, same, count = sums.tolist()
        if self.context.job.family.numbers:
            return {"cosine": 1 - kl / count}
        return {"kl": kl / count} | ({"top1": same / count} if logits.shape[1] > 1 else {})


@torch.inference_mode()
def _outputs_of(context: RunContext, expert: nn.Module, task: ScoredTask) -> Iterator[tuple[Batch, SoftLabels]]:
    family = context.job.family
    top = TOP if family.vocabulary else None
    for drawn in _batches(context, task):
        batch = family.complete(expert, drawn)
        found = Outputs(_logits(context, expert, batch, task), None, numbers=family.numbers)
        yield batch, SoftLabels.of(found, 1.0, top)


def _logits(context: RunContext, model: nn.Module, batch: Batch, task: ScoredTask) -> Tensor:
    """The logits (rows, classes) of a batch, some samples at a time. Of batches with `ANSWERS` those that predict the
    tokens of answers."""
    family, read = context.job.family, without(batch, (ANSWERS,))
    with fast_linears(model):
        logits: Tensor = context.scorer.micro.rows(lambda part: outputs(family, model, part, task.head).logits, read)
    if ANSWERS not in batch:
        return logits
    predicts = batch[ANSWERS].roll(-1, 1)
    predicts[:, -1] = 0  # the token that it predicts is outside of the window
    return logits[predicts.flatten() == 1]


def _batches(context: RunContext, task: ScoredTask) -> Iterator[Batch]:
    """Batches of some of the test samples; of language models windows of `length` tokens, one at a time, and with
    predicted answers if only these count."""
    job = context.job
    if not len(task.samples):
        return
    if task.text is not None:
        length = min(task.length, len(task.text))
        windows = torch.split(task.text, length)[: len(task.text) // length]
        counted = [window for window in windows if window.ndim == 1 or window[1:, 1].any()]
        for window in counted[: min(SAMPLES, max(1, TOKENS // length))]:
            parts = (window,) if window.ndim == 1 else window.unbind(1)
            yield {name: part[None].to(job.device) for name, part in zip(("input_ids", ANSWERS), parts, strict=False)}
        return
    count = min(SAMPLES, len(task.samples))
    some = task.samples.take([number * len(task.samples) // count for number in range(count)])
    yield from batches(some, task.collate, job.evaluation.batch_size, job.device)
