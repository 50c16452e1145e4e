"""The moments of one task at a step, from what student and teacher bring there."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from epmq_cli.calibrate.activations.capture import LayerInputs
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.moments import Measure, Moments


def measured(
    batches: Iterable[LayerInputs], expert: Tensor, scale: float | None, guidance: Guidance
) -> tuple[Moments, int]:
    """The moments of one task, and the tokens of this process.

    `expert`: the weights (out, in) of all linears of the step. `scale`: what their outputs are multiplied with
    before they are added to the residual stream, whose drift their targets then make up for too; None where they write
    into no stream.
    """
    measure, tokens, (out, width) = Measure(), 0, expert.shape
    # the multiplications of a token: 2 out width by way of the part, 3 / 2 width^2 by way of the drift
    by_drift = guidance.teaches and scale is None and 4 * out > 3 * width
    for rows in batches:
        if by_drift:
            measure.add_drift(rows.student[0], _drift(rows, guidance), rows.weights)
        else:
            measure.add(rows.student[0], _part(rows, expert, scale, guidance), rows.weights)
        tokens += len(rows.student[0])
    return measure.moments(expert if by_drift else None), tokens


def _drift(rows: LayerInputs, guidance: Guidance) -> Tensor:
    """How far the teacher's inputs are from the student's, times alpha: (tokens, in)."""
    drift: Tensor = float(guidance.alpha) * (rows.teacher[0] - rows.student[0])
    return drift


def _part(rows: LayerInputs, expert: Tensor, scale: float | None, guidance: Guidance) -> Tensor | None:
    """The part of the linears' targets (tokens, out) that is no weight times the student's inputs."""
    if not guidance.teaches:
        return None
    part = _drift(rows, guidance) @ expert.T
    if scale is not None:
        stream = float(guidance.beta) / scale * (rows.teacher[1] - rows.student[1])
        part.view(len(part), -1, stream.shape[1]).add_(stream[:, None])  # once for each linear
    return part
