"""Oracles: the paper's objective and closed form, written out, and the paper's own loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.moments import Measure, task_weight
from epmq_cli.calibrate.objective import Objective
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.errors import ConfigError
from epmq_cli.pipeline.job import make_job
from epmq_cli.quantize.gptaq import Gptaq
from epmq_cli.quantize.gptq import gptq
from tests.helpers.formats import ints
from tests.helpers.hubs import config
from tests.quantize.test_gptq import reference

IN, OUT, GROUP, TOKENS, DAMPING, LAM = 32, 24, 16, 400, 0.01, 0.001


def drawn(seed: int, distance: float) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (OUT, IN), the inputs behind quantized layers, and those of the unquantized model (TOKENS, IN)."""
    generator = torch.Generator().manual_seed(seed)
    weight, mix, drift = (torch.randn(n, IN, generator=generator, dtype=torch.float64) for n in (OUT, IN, IN))
    unquantized = torch.randn(TOKENS, IN, generator=generator, dtype=torch.float64) @ mix
    noise = torch.randn(TOKENS, IN, generator=generator, dtype=torch.float64) @ mix
    return weight, unquantized + distance * (unquantized @ drift / IN**0.5 + noise), unquantized


def target_of(weight: Tensor, X: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """W* and H of a layer under guidance=gptaq."""
    measure, anchor = Measure(), Affine(weight, None)
    measure.add(X, (E - X) @ weight.T, None)
    moments, objective = measure.moments(), Objective(anchor, LAM, False)
    objective.add(moments, anchor, task_weight(moments.norm, moments.tokens, "frobenius"))
    problem = objective.closed()
    return problem.solve()[0], problem.H


def of_the_paper(weight: Tensor, X: Tensor, E: Tensor, bits: int, alpha: float) -> Tensor:
    """The loop of the paper's code: P spreads the difference of each channel over the later columns."""
    H, drift, format = X.T @ X, (E - X).T @ X, ints(bits, GROUP)
    U = torch.linalg.cholesky(torch.linalg.inv(H + DAMPING * H.diagonal().mean() * torch.eye(IN)), upper=True)
    P = alpha * (drift @ U.T).triu(1) @ U
    W, out = weight.clone(), torch.empty_like(weight)
    for i in range(IN):
        if i % GROUP == 0:
            grid = format.fit(W[:, i : i + GROUP], "mse", torch.float64)
        current = W[:, i].clone()
        out[:, i] = format.decode(format.encode(current, grid), grid)
        error = (current - out[:, i]) / U[i, i]
        W[:, i:] += current[:, None] * P[i, i:] - error[:, None] * U[i, i:]
    return out


def test_its_weight_is_gptqs_for_the_closed_form() -> None:
    weight, X, E = drawn(0, 0.2)
    target, H = target_of(weight, X, E)
    square = X.T @ X
    s = 1 / square.norm()
    closed = weight + s * weight @ (E - X).T @ X @ torch.linalg.inv(s * square + LAM * torch.eye(IN))
    torch.testing.assert_close(target, closed, rtol=1e-6, atol=1e-6)
    own = gptq(target, H, ints(3, GROUP), "mse", torch.float64, DAMPING, 128, False).weight.dequantize()
    wanted = reference(closed, s * square + LAM * torch.eye(IN), ints(3, GROUP), "mse", DAMPING, False)
    torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "distance", "most"), [(2, 0.05, 0.97), (2, 0.3, 0.85), (4, 0.05, 0.9), (4, 0.3, 0.65)]
)
def test_it_loses_less_than_the_papers_loop(bits: int, distance: float, most: float) -> None:
    losses = {"own": 0.0, "1": 0.0, "0.25": 0.0, "gptq": 0.0}
    for seed in range(5):
        weight, X, E = drawn(seed, distance)
        target, H = target_of(weight, X, E)
        options = (H, ints(bits, GROUP), "mse", torch.float64, DAMPING, 128, False)
        weights = {
            "own": gptq(target, *options).weight.dequantize(),
            "gptq": gptq(weight, *options).weight.dequantize(),
            **{alpha: of_the_paper(weight, X, E, bits, float(alpha)) for alpha in ("1", "0.25")},
        }
        for name, own in weights.items():
            losses[name] += float((X @ own.T - E @ weight.T).square().sum() / (E @ weight.T).square().sum())
    assert losses["1"] < (0.9 if distance > 0.1 else 1.02) * losses["gptq"]
    assert losses["own"] < most * min(losses["1"], losses["0.25"])


def test_guidance_without_a_teacher_is_refused(clip_hub: Path) -> None:
    with pytest.raises(ConfigError, match=r"got guidance.alpha=0, which .*; use guidance=gptaq, or quant=gptq"):
        make_job(config(clip_hub, "quant=gptaq", "guidance=merged"))
    job = make_job(config(clip_hub, "quant=gptaq", "guidance=gptaq", "merge=none"))
    assert isinstance(job.quantizer, Gptaq)
    assert (job.guidance.lam, job.guidance.targets, job.guidance.beta) == (LAM, "merged", 0)
