"""Counts what `refine=distill` does: the experts' outputs, and the epochs of training with their optimizers."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from epmq_cli.data.held_out import HOLD
from epmq_cli.inspection.operations import CALLS, Operations, times
from epmq_cli.pipeline.job import Job
from epmq_cli.refine.distill import Distill
from epmq_cli.refine.muon import STEPS

if TYPE_CHECKING:
    from epmq_cli.inspection.work import Work

FITTED = 1 - 1 / HOLD
"""The share of the samples that are fitted; the others are held out."""
BACKWARD = 2
"""A backward pass computes the gradients of inputs and of weights: two products, and calls, for each of the forward
pass."""
MUON_CALLS = 6 * STEPS + 12
ADAM_CALLS = 14
COPY_CALLS = 6
"""The calls for each tensor of a step: of the optimizers, and of sums and copies of gradients and weights."""


def refinement_work(job: Job, work: Work, walk: Operations, linears: int) -> Operations:
    """The walk without a quantizer, the experts' outputs for each view, and the epochs. `walk`: on all samples and
    their views. `linears`: their number in all blocks."""
    distill = job.refine
    if not isinstance(distill, Distill):
        return Operations()
    views = job.calib.views
    tokens, samples = work.tokens / views, work.samples / views
    parts = samples / min(distill.batch_size, job.calib.batch_size)  # batches of a pass over all samples
    outputs = distill.views * FITTED + 1 / HOLD
    epochs = len(distill.rates(0.0)) * distill.epochs + distill.packed_epochs
    passes = outputs + epochs * (FITTED * (1 + BACKWARD) + 1 / HOLD)
    done = times(walk, FITTED if distill.epochs else 0)
    done.single += passes * tokens * work.forward
    done.calls += passes * parts * CALLS * linears
    steps = epochs * ceil(FITTED * parts / max(len(job.suite.members), 1))
    _add(done, steps, _optimizer(distill, work, len(job.suite.members)))
    return done


def _optimizer(distill: Distill, work: Work, tasks: int) -> Operations:
    """One step of the optimizers, and the sums of the gradients of the tasks."""
    done = Operations(calls=work.tensors * (COPY_CALLS + tasks + ADAM_CALLS))
    if distill.optimizer == "muon" and distill.trained == "all":
        for group in work.groups:
            done.single += sum(_orthogonalized(group.width, outs) for outs in [group.outs / group.count] * group.count)
            done.calls += group.count * (MUON_CALLS - ADAM_CALLS)
    return done


def _orthogonalized(width: float, outs: float) -> float:
    """The operations of Muon for a matrix: of each step the gram matrix, its square and a product with the matrix."""
    short, long = min(width, outs), max(width, outs)
    return STEPS * (4 * short**2 * long + 2 * short**3)


def _add(done: Operations, factor: float, more: Operations) -> None:
    done.single += factor * more.single
    done.calls += factor * more.calls
