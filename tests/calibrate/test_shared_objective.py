"""Oracle: one process with all rows, in float64; some linears have fewer rows than there are processes, and experts of
mixtures may get no token in a process or of a task."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, multiprocessing

from epmq_cli.calibrate.activations.capture import LayerInputs
from epmq_cli.calibrate.fold import measure_inputs
from epmq_cli.calibrate.held_out_step import best_step
from epmq_cli.calibrate.moments import Measure, frobenius, task_weight
from epmq_cli.calibrate.objective import Objective
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.calibrate.solve_layer import InputRange, solve
from epmq_cli.quantize.gptq import Gptq
from epmq_cli.runtime import distributed
from tests.helpers.formats import ints

IN, OUTS, PROCESSES, TASKS, BATCHES = 8, (1, 1), 3, 2, 6
CASES = [*product((False, True), repeat=2)]
GPTQ = Gptq(ints(3, 4), grid="hessian", damping=0.01, block_size=128, act_order=False)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(seed: int) -> Affine:
    return Affine(rand(sum(OUTS), IN, seed=seed), rand(sum(OUTS), seed=seed + 1))


def tokens(routed: bool, task: int, batch: int) -> int:
    """The number of rows of a batch. `routed`: the second process has none, nor has the second task."""
    return 0 if routed and (task == 1 or batch % PROCESSES == 1) else 5


def solve_part(by_drift: bool, routed: bool) -> dict[str, Tensor]:
    """The results of this process for its part of the batches."""
    anchor = affine(100)
    objectives = [Objective(anchor, lam, True, distributed) for lam in (0.05, 0.0)]
    for task in range(TASKS):
        expert, measures = affine(200 + 10 * task), [Measure(distributed) for _ in objectives]
        for batch in distributed.rank_slice(range(BATCHES)):
            count = tokens(routed, task, batch)
            X, drift = (rand(count, IN, seed=1000 * task + 10 * batch + other) for other in range(2))
            for measure, own in zip(measures, (slice(4), slice(4, None)), strict=True):
                if by_drift:
                    measure.add_drift(X[own], drift[own], None)
                else:
                    measure.add(X[own], drift[own] @ expert.weight.T, None)
        moments = [measure.moments(expert.weight if by_drift else None) for measure in measures]
        norm = frobenius(distributed, *(part.xx for part in moments))
        for objective, part in zip(objectives, moments, strict=True):
            objective.add(part, expert, task_weight(norm, 30.0, "frobenius"))
    problem = objectives[0].plus(objectives[1]).closed()
    step = best_step(objectives[0].closed().solve()[0], objectives[1].closed(), anchor.weight)
    target, (found, records) = (
        problem.solution(distributed),
        solve(problem, ("q", "k"), list(OUTS), InputRange(30, 4.0), GPTQ, torch.float32, step),
    )
    assert target.bias is not None
    weights = torch.cat([solution.weight.dequantize() for solution in found])
    biases = torch.cat([solution.bias for solution in found if solution.bias is not None])
    numbers = [getattr(r, f.name) for r in records for f in fields(r) if isinstance(getattr(r, f.name), float)]
    return {
        "target": target.weight,
        "target bias": target.bias,
        "H": problem.H,
        "weights": weights,
        "biases": biases,
        "records": torch.tensor(numbers, dtype=torch.float64),
        **statistics(routed),
    }


def statistics(routed: bool) -> dict[str, Tensor]:
    """The statistics of the inputs that transforms read, from this process's part of the batches."""
    guidance: Any = SimpleNamespace(task_weight="tokens", factor=lambda task: 1.0)

    def rows(task: int) -> Iterator[LayerInputs]:
        for batch in distributed.rank_slice(range(BATCHES)):
            own = [rand(tokens(routed, task, batch), IN, seed=1000 * task + 10 * batch)]
            yield LayerInputs(own, own, None)

    return asdict(measure_inputs(((str(task), rows(task)) for task in range(TASKS)), guidance))


def work(number: int, folder: Path) -> None:
    """The body of one process."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(PROCESSES)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=number, world_size=PROCESSES
    )
    for case in CASES:
        torch.save(solve_part(*case), folder / f"{number}-{case}.pt")
    torch.distributed.destroy_process_group()


def test_every_process_gets_the_result_of_a_single_process(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of forks with threads
        multiprocessing.start_processes(work, (tmp_path,), PROCESSES, start_method="fork")  # type: ignore[no-untyped-call]
    for case in CASES:
        alone = solve_part(*case)
        for number in range(PROCESSES):
            found = torch.load(tmp_path / f"{number}-{case}.pt")
            torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)
