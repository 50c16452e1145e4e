"""A task's own head solved again: a linear with one task, from the student's features to the expert's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epmq_cli.calibrate.moments import Measure, task_weight
from epmq_cli.calibrate.objective import Objective
from epmq_cli.quantize.layer_problem import Affine
from epmq_cli.runtime.distributed import all_reduce


def solved_head(own: Sequence[Tensor], teacher: Sequence[Tensor], head: Affine, lam: float) -> Affine:
    """The head (classes, width) that brings the student's inputs of it, batches of (samples, width), nearest to the
    logits that the expert's inputs give with the given head, anchored there with weight `lam` as in objective.py.

    The bias is free where the head has one.
    """
    measure = Measure()
    for mine, others in zip(own, teacher, strict=True):
        measure.add(mine, (others - mine) @ head.weight.T, None)
    moments = measure.moments()
    objective = Objective(head, lam, intercepts=head.bias is not None)
    objective.add(moments, head, task_weight(moments.norm, moments.tokens, "frobenius"))
    found = objective.closed().solution()
    return Affine(found.weight.to(head.weight.dtype), None if found.bias is None else found.bias.to(head.weight.dtype))


def relative_error(own: Tensor, teacher: Tensor) -> float:
    """Squared distance of the student's features or logits from the expert's (samples, width), relative to the latter's
    variance; 0 where that is 0. The samples of all processes count."""
    wanted, found = teacher.double(), own.double()
    count, sums = all_reduce(torch.tensor(float(len(wanted)))), all_reduce(wanted.sum(0))
    squares, error = all_reduce(wanted.square().sum()), all_reduce((found - wanted).square().sum())
    spread = float(squares - sums.square().sum() / count)
    return float(error) / spread if spread > 1e-12 * float(squares) else 0.0
