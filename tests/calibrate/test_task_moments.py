"""Oracles: the same sums without a place to wait, byte for byte, and the number of matrices that a factor takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate import moments, row_pieces
from epmq_cli.calibrate.activations.capture import LayerInputs
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.calibrate.solve_layer import SolvedLinear, solve
from epmq_cli.calibrate.task_moments import measure_objective
from epmq_cli.quantize import gptq, linalg
from epmq_cli.quantize.gptq import Gptq
from tests.helpers.formats import ints
from tests.helpers.gpu import DEVICE, STANDIN

OUT, WIDTH, TOKENS = 16, 1024, 96
MATRIX = 8 * WIDTH**2
GUIDANCE: dict[str, Any] = {"targets": "expert", "lam": 0.05, "alpha": 1, "beta": 1, "rho": 1, "weights": None}
GUIDANCE |= dict.fromkeys(("intercepts", "norms", "embeddings", "readout"), False)
GUIDANCE |= {"readout_weight": 1, "heads": "never", "sweeps": 1, "task_weight": "frobenius"}
GPTQ = Gptq(ints(4, 64), "mse", 0.01, 128, False)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def solved(safe: bool, waiting: torch.device | None) -> SolvedLinear:
    """A wide linear of two tasks, calibrated and quantized on the device."""
    anchor = rand(OUT, WIDTH, seed=0)
    student: Any = SimpleNamespace(
        guidance=Guidance(**GUIDANCE, safe=safe),
        waiting=waiting,
        stacked_anchor=lambda names: Affine(anchor, None),
        affine_expert=lambda task, name: Affine(anchor + rand(OUT, WIDTH, seed=len(task)), None),
        own=lambda name: anchor.clone(),
    )
    held = (torch.arange(TOKENS) % 4 == 0).to(DEVICE) if safe else None

    def rows(task: str) -> LayerInputs:
        own, other = ([rand(TOKENS, width, seed=seed) for width in (WIDTH, OUT)] for seed in (1, len(task)))
        return LayerInputs(own, other, None, held)

    tasks = ((task, iter([rows(task)])) for task in ("one", "three"))
    problem, step, seen = measure_objective(student, ["down"], tasks, 1.0)
    return solve(problem, ["down"], [OUT], seen, GPTQ, torch.float32, step)[0][0]


@pytest.mark.gpu
@pytest.mark.parametrize("safe", [True, False])
def test_sums_that_wait_on_the_host_give_the_same_bytes_and_leave_room_on_the_gpu(
    safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most H, its inverse and that in float32 are on the GPU at once, or the moments of two parts of the tokens."""
    monkeypatch.setattr(linalg, "LARGE", 256)
    monkeypatch.setattr(row_pieces, "PIECE", 1 << 16)
    for module in (linalg, gptq, moments):
        monkeypatch.setattr(module, "PANEL", 64)
    found, peaks = [], []
    for waiting in (torch.device("cpu"), None):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(solved(safe, waiting))
        peaks.append((torch.cuda.max_memory_allocated() - before) / MATRIX)
    first, second = (solution.weight.dequantize() for solution in found)
    assert torch.equal(first, second)
    if STANDIN:  # a GPU also counts what its libraries work with
        assert peaks[0] < 2.9
        assert peaks[1] < (4.9 if safe else 2.9)
