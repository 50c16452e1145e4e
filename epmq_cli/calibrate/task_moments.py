"""The moments of a task, and the objective of all tasks, from the inputs of a group of linears."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from epmq_cli.calibrate.activations.capture import LayerInputs
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.held_out_step import Step, best_step
from epmq_cli.calibrate.moments import Measure, Moments, frobenius, task_weight
from epmq_cli.calibrate.objective import Objective
from epmq_cli.calibrate.quadratic import Affine, QuadraticProblem
from epmq_cli.calibrate.solve_layer import InputRange
from epmq_cli.calibrate.student import Student
from epmq_cli.errors import ModelError
from epmq_cli.runtime import distributed
from epmq_cli.runtime.products import fast_products


def measure_objective(
    student: Student, names: Sequence[str], tasks: Iterable[tuple[str, Iterator[LayerInputs]]], scale: float | None
) -> tuple[QuadraticProblem, Step | None, InputRange]:
    """The problem of linears that read the same input, stacked; with `guidance.safe` the step towards its solution; and
    the range of that input.

    `tasks`: their inputs, batch by batch. `scale`: see `measured`. ModelError if the inputs are not finite.
    """
    guidance, ranges, anchor = student.guidance, [], student.stacked_anchor(names)
    lams = [float(guidance.lam), 0.0] if guidance.safe else [float(guidance.lam)]
    objectives = [Objective(anchor, lam, guidance.intercepts, distributed, student.waiting) for lam in lams]
    for task, batches in tasks:
        expert = Affine.stacked([student.affine_expert(task, name) for name in names])
        parts, inputs = measured(batches, expert.weight, scale, guidance)
        norm = parts[0].norm if len(parts) == 1 else frobenius(distributed, *(moments.xx for moments in parts))
        if not math.isfinite(norm):
            raise ModelError(
                f"the inputs of {names[0]} hold NaN or infinity on task {task}; check the experts and the merge"
            )
        s = task_weight(norm, sum(moments.tokens for moments in parts), guidance.task_weight)
        for objective, moments in zip(objectives, parts, strict=True):
            objective.add(moments, expert, s * guidance.factor(task))
        del parts, moments, objective, expert  # before others of their size are made
        ranges.append(inputs)
    over_all = _over_all([_over_all(own) for own in distributed.all_gather(ranges)])
    if not guidance.safe:
        return objectives[0].closed(), None, over_all
    fitted, held = objectives
    total, merged = fitted.plus(held), torch.cat([student.own(f"{name}.weight") for name in names])
    solution = fitted.closed().solve(conditioned=False)[0]
    step = best_step(solution, held.closed(), merged)
    del objectives, fitted, held, solution
    return total.closed(), step, over_all


def measured(
    batches: Iterable[LayerInputs], expert: Tensor, scale: float | None, guidance: Guidance
) -> tuple[list[Moments], InputRange]:
    """The moments of one task, with `guidance.safe` those of its held-out tokens apart, and the range of the inputs of
    this process.

    `expert`: the weights (out, in) of all linears of the group. `scale`: the factor of their outputs if these are
    added to the residual stream, so that their targets also compensate the drift of the stream; None otherwise.
    """
    measures, tokens, largest, (out, width) = [Measure(distributed)], 0, 0.0, expert.shape
    if guidance.safe:
        measures.append(Measure(distributed))
    # multiplications per token: 2 out width with the part, 3 / 2 width^2 with the drift
    by_drift = guidance.teaches and scale is None and 4 * out > 3 * width
    for whole in batches:
        for measure, rows in zip(measures, whole.parts(), strict=True):
            if by_drift:
                measure.add_drift(rows.student[0], _drift(rows, guidance), rows.weights)
            else:
                measure.add(rows.student[0], _part(rows, expert, scale, guidance), rows.weights)
        tokens += len(whole.student[0])
        if len(whole.student[0]):  # an expert of a mixture may read no token
            low, high = whole.student[0].aminmax()
            largest = max(largest, -float(low), float(high))
    return [measure.moments(expert if by_drift else None) for measure in measures], InputRange(tokens, largest)


def _over_all(ranges: Sequence[InputRange]) -> InputRange:
    """The range of all inputs together."""
    return InputRange(sum(own.tokens for own in ranges), max(own.largest for own in ranges))


def _drift(rows: LayerInputs, guidance: Guidance) -> Tensor:
    """alpha times the distance of the teacher's inputs from the student's: (tokens, in)."""
    drift: Tensor = float(guidance.alpha) * (rows.teacher[0] - rows.student[0])
    return drift


@fast_products()
def _part(rows: LayerInputs, expert: Tensor, scale: float | None, guidance: Guidance) -> Tensor | None:
    """The part of the targets (tokens, out) that is not a linear function of the student's inputs."""
    if not guidance.teaches:
        return None
    part = _drift(rows, guidance) @ expert.T
    if scale is not None:
        stream = float(guidance.beta) / scale * (rows.teacher[1] - rows.student[1])
        part.view(len(part), part.shape[1] // stream.shape[1], stream.shape[1]).add_(
            stream[:, None]
        )  # once for each linear
    return part
