"""Solves a task's own head: a linear with one task, from the student's features to the expert's logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from epmq_cli.calibrate.moments import Measure, task_weight
from epmq_cli.calibrate.objective import Objective
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.calibrate.sharing import ALONE, Sharing


def solved_head(
    own: Sequence[Tensor], teacher: Sequence[Tensor], head: Affine, lam: float, sharing: Sharing = ALONE
) -> Affine:
    """The head (classes, width) whose logits for the student's inputs are nearest to those of `head` for the expert's.

    `own` and `teacher`: batches of these inputs, (samples, width). `lam`: weight of the anchor, `head`, as in
    objective.py. The bias is free if the head has one. `sharing`: how processes share the samples.
    """
    measure = Measure(sharing)
    for mine, others in zip(own, teacher, strict=True):
        measure.add(mine, (others - mine) @ head.weight.T, None)
    moments = measure.moments()
    objective = Objective(head, lam, head.bias is not None, sharing)
    objective.add(moments, head, task_weight(moments.norm, moments.tokens, "frobenius"))
    found = objective.closed().solution(sharing)
    return Affine(found.weight.to(head.weight.dtype), None if found.bias is None else found.bias.to(head.weight.dtype))
