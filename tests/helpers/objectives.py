"""Small problems of the objective, and the objective written out in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_cli.calibrate.moments import Measure, Moments, task_weight
from epmq_cli.calibrate.objective import Objective
from epmq_cli.calibrate.quadratic import Affine, QuadraticProblem

OUT, IN, TASKS = 6, 8, 3


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Given:
    """Per task: anchor, experts, inputs of different scale and number, the other part of the targets, token weights."""

    anchor: Affine
    experts: list[Affine]
    inputs: list[Tensor]
    parts: list[Tensor | None]
    weights: list[Tensor | None]

    def moments(self) -> list[Moments]:
        found = []
        for rows, part, weights in zip(self.inputs, self.parts, self.weights, strict=True):
            measure = Measure()
            measure.add(rows, part, weights)
            found.append(measure.moments())
        return found

    def s(self, kind: str = "frobenius") -> list[float]:
        return [task_weight(m.norm, m.tokens, kind) for m in self.moments()]

    def problem(self, lam: float, intercepts: bool, kind: str = "frobenius") -> QuadraticProblem:
        objective = Objective(self.anchor, lam, intercepts)
        for moments, expert, s in zip(self.moments(), self.experts, self.s(kind), strict=True):
            objective.add(moments, expert, s)
        return objective.closed()

    def written_out(self, Q: Tensor, b: Tensor | None, lam: float, kind: str = "frobenius") -> Tensor:
        """J(Q, b) as in the docstring of objective.py; without intercepts, biases do not enter."""
        total = lam * (Q - self.anchor.weight).square().sum()
        if b is not None and self.anchor.bias is not None:
            total = total + lam * (b - self.anchor.bias).square().sum()
        for s, X, expert, part, weights in zip(
            self.s(kind), self.inputs, self.experts, self.parts, self.weights, strict=True
        ):
            error = X @ Q.T - X @ expert.weight.T
            if part is not None:
                error = error - part
            if b is not None and expert.bias is not None:
                error = error + b - expert.bias
            w = torch.ones(len(X), dtype=X.dtype) if weights is None else weights
            total = total + s * (w[:, None] * error.square()).sum()
        return total


def relative(problem: QuadraticProblem, Q: Tensor) -> float:
    energy = float(problem.energy().sum())
    return float(problem.loss(Q, *problem.solve()).sum()) / energy if energy else 0.0


def given_problem(rich: bool = False) -> Given:
    """With `rich`, targets have parts other than weight times inputs, and tokens have different weights."""
    anchor = Affine(rand(OUT, IN, seed=100), rand(OUT, seed=101))
    assert anchor.bias is not None
    experts = [
        Affine(anchor.weight + 0.3 * rand(OUT, IN, seed=t), anchor.bias + rand(OUT, seed=50 + t)) for t in range(TASKS)
    ]
    inputs = [10**t * (rand(20 + 5 * t, IN, seed=10 + t) + 0.5) for t in range(TASKS)]
    parts = [rand(len(rows), OUT, seed=20 + t) if rich else None for t, rows in enumerate(inputs)]
    weights = [rand(len(rows), seed=30 + t).abs() if rich else None for t, rows in enumerate(inputs)]
    return Given(anchor, experts, inputs, parts, weights)
