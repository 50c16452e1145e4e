"""Solves one norm of the student from its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from epmq_cli.calibrate.activations.capture import LayerInputs
from epmq_cli.calibrate.norms import NormObjective, normalised, unit
from epmq_cli.calibrate.student import Student
from epmq_cli.runtime import distributed


def solve_norm(student: Student, name: str, tasks: Iterable[tuple[str, Iterator[LayerInputs]]]) -> None:
    """Replaces gain and bias of the norm of this name; `tasks`: the inputs of the norm, batch by batch."""
    norm, anchor, guidance = student.model.get_submodule(name), student.affine_anchor(name), student.guidance
    added = unit(norm)
    objective = NormObjective(anchor.weight + added, anchor.bias, float(guidance.lam), distributed)
    for task, batches in tasks:
        expert = student.affine_expert(task, name)
        for rows in batches:
            z = normalised(norm, rows.student[0])
            target = z + float(guidance.alpha) * (normalised(norm, rows.teacher[0]) - z)
            objective.add(z, target, rows.weights, expert.weight + added, expert.bias)
        objective.close(guidance.factor(task))
    gain, bias = objective.solve()
    student.put_affine(name, gain - added, bias)
