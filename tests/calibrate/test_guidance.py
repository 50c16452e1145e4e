"""Oracles: the objective written out, least squares of stacked inputs (RegMean), and invariants; all in float64."""

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.guidance import Guidance, Objective
from epmq_cli.calibrate.moments import real_tokens, second_moment, task_weight
from epmq_cli.errors import ConfigError
from epmq_cli.quantize.gptq import gptq
from epmq_cli.quantize.grid import GridSpec

OUT, IN, TASKS = 6, 8, 3


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Anchor (OUT, IN), experts' weights, and inputs of different scale and number for each task."""
    anchor = rand(OUT, IN, seed=100)
    experts = [anchor + 0.3 * rand(OUT, IN, seed=t) for t in range(TASKS)]
    inputs = [10**t * rand(20 + 5 * t, IN, seed=10 + t) for t in range(TASKS)]
    return anchor, experts, inputs


def objective_of(guidance: Guidance, anchor: Tensor, experts: list[Tensor], inputs: list[Tensor]) -> Objective:
    objective = Objective([anchor], guidance)
    for weight, rows in zip(experts, inputs, strict=True):
        objective.add(*second_moment([rows]), [weight])
    return objective


def written_out(Q: Tensor, guidance: Guidance, anchor: Tensor, experts: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """J(Q) / sum_t s_t ||X_t W_t'||^2 as design.md writes it."""
    s = [task_weight(X.T @ X, len(X), guidance.task_weight) for X in inputs]
    fit = sum(w * (X @ Q.T - X @ W.T).square().sum() for w, X, W in zip(s, inputs, experts, strict=True))
    energy = sum(w * (X @ W.T).square().sum() for w, X, W in zip(s, inputs, experts, strict=True))
    return (fit + guidance.lam * (Q - anchor).square().sum()) / energy


@pytest.mark.parametrize("kind", ["frobenius", "tokens"])
@pytest.mark.parametrize("lam", [0.0, 0.05, 2.0])
def test_target_minimises_the_written_out_objective(kind: str, lam: float) -> None:
    anchor, experts, inputs = problem()
    guidance = Guidance("expert", lam, kind)
    targets, factor = objective_of(guidance, anchor, experts, inputs).targets()
    assert factor is not None
    Q = targets[0].clone().requires_grad_()
    written_out(Q, guidance, anchor, experts, inputs).backward()  # type: ignore[no-untyped-call]
    assert Q.grad is not None
    assert Q.grad.abs().max() < 1e-12


def test_without_anchor_the_target_is_regmean() -> None:
    anchor, experts, inputs = problem()
    guidance = Guidance("expert", 0.0, "frobenius")
    weights = [task_weight(X.T @ X, len(X), "frobenius") ** 0.5 for X in inputs]
    stacked = torch.cat([w * X for w, X in zip(weights, inputs, strict=True)])
    outputs = torch.cat([w * X @ W.T for w, X, W in zip(weights, inputs, experts, strict=True)])
    direct = torch.linalg.lstsq(stacked, outputs).solution.T
    targets, _ = objective_of(guidance, anchor, experts, inputs).targets()
    torch.testing.assert_close(targets[0], direct, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_relative_loss_is_the_written_out_objective(lam: float) -> None:
    anchor, experts, inputs = problem()
    guidance = Guidance("expert", lam, "frobenius")
    objective = objective_of(guidance, anchor, experts, inputs)
    for Q in (anchor, experts[0], rand(OUT, IN, seed=7)):
        expected = written_out(Q, guidance, anchor, experts, inputs).item()
        assert objective.relative_loss(0, Q) == pytest.approx(expected, rel=1e-10)


def test_loss_away_from_the_target_is_the_quadratic_form_that_gptq_minimises() -> None:
    anchor, experts, inputs = problem()
    objective = objective_of(Guidance("expert", 0.05, "frobenius"), anchor, experts, inputs)
    target = objective.targets()[0][0]
    energy = sum(
        task_weight(X.T @ X, len(X), "frobenius") * (X @ W.T).square().sum()
        for X, W in zip(inputs, experts, strict=True)
    )
    Q = rand(OUT, IN, seed=7)
    form = torch.trace((Q - target) @ objective.H @ (Q - target).T) / energy
    assert objective.relative_loss(0, Q) - objective.relative_loss(0, target) == pytest.approx(float(form), rel=1e-9)


def test_experts_equal_to_the_anchor_give_gptq_of_the_merge_bit_for_bit() -> None:
    anchor, _, inputs = problem()
    anchor = anchor.float().double()
    same = objective_of(Guidance("expert", 0.0, "frobenius"), anchor, [anchor.clone() for _ in inputs], inputs)
    plain = objective_of(Guidance("merged", 0.0, "frobenius"), anchor, [anchor] * TASKS, inputs)
    spec = GridSpec(4, 4, True, "mse")
    results = [
        gptq(o.targets()[0][0].float(), o.H, spec, torch.float32, 0.01, 128, False).weight for o in (same, plain)
    ]
    assert torch.equal(results[0].values, results[1].values)
    assert torch.equal(results[0].scale, results[1].scale)
    assert torch.equal(same.targets()[0][0], anchor)


def test_a_strong_anchor_gives_the_anchor() -> None:
    anchor, experts, inputs = problem()
    targets, _ = objective_of(Guidance("expert", 1e9, "frobenius"), anchor, experts, inputs).targets()
    torch.testing.assert_close(targets[0], anchor, rtol=1e-7, atol=1e-7)


def test_one_expert_without_anchor_is_that_expert() -> None:
    anchor, experts, inputs = problem()
    targets, _ = objective_of(Guidance("expert", 0.0, "frobenius"), anchor, experts[:1], inputs[:1]).targets()
    torch.testing.assert_close(targets[0], experts[0], rtol=1e-9, atol=1e-10)


def test_order_of_tasks_changes_nothing() -> None:
    anchor, experts, inputs = problem()
    guidance = Guidance("expert", 0.05, "frobenius")
    forward, _ = objective_of(guidance, anchor, experts, inputs).targets()
    backward, _ = objective_of(guidance, anchor, experts[::-1], inputs[::-1]).targets()
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-12)


def test_frobenius_weights_make_the_scale_of_a_task_irrelevant() -> None:
    anchor, experts, inputs = problem()
    guidance = Guidance("expert", 0.05, "frobenius")
    plain, _ = objective_of(guidance, anchor, experts, inputs).targets()
    scaled, _ = objective_of(guidance, anchor, experts, [100 * inputs[0], *inputs[1:]]).targets()
    torch.testing.assert_close(plain, scaled, rtol=1e-9, atol=1e-11)


def test_dead_columns_keep_the_anchor() -> None:
    anchor, experts, inputs = problem()
    for rows in inputs:
        rows[:, 2] = 0
    targets, factor = objective_of(Guidance("expert", 0.0, "frobenius"), anchor, experts, inputs).targets()
    assert factor is not None
    assert factor.damping == 0
    assert torch.equal(targets[0][:, 2], anchor[:, 2])
    assert not torch.equal(targets[0][:, 3], anchor[:, 3])


def test_fewer_tokens_than_inputs_still_gives_a_finite_target_and_says_the_damping() -> None:
    anchor, experts, inputs = problem()
    few = [rows[:1] for rows in inputs]
    targets, factor = objective_of(Guidance("expert", 0.0, "frobenius"), anchor, experts, few).targets()
    assert factor is not None
    assert factor.damping > 0
    assert torch.isfinite(targets[0]).all()


def test_all_zero_inputs_keep_the_anchor() -> None:
    anchor, experts, inputs = problem()
    objective = objective_of(Guidance("expert", 0.0, "frobenius"), anchor, experts, [0 * rows for rows in inputs])
    assert torch.equal(objective.targets()[0][0], anchor)
    assert objective.relative_loss(0, anchor) == 0


def test_moments_of_batches_are_those_of_all_rows_at_once() -> None:
    rows = rand(30, IN, seed=0)
    whole, tokens = second_moment([rows])
    parts, counted = second_moment(rows.split([7, 1, 22]))
    assert tokens == counted == 30
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(whole, rows.T @ rows)


def test_padding_never_enters_the_rows() -> None:
    inputs = rand(2, 3, IN, seed=0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    kept = real_tokens(inputs, mask)
    assert torch.equal(kept, torch.stack([inputs[0, 0], inputs[0, 1], inputs[1, 0]]))
    assert real_tokens(inputs, None).shape == (6, IN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("experts", 0.05, "frobenius"), "guidance.targets must be one of merged, expert, got 'experts'"),
        (("expert", -1, "frobenius"), r"guidance.lam must be a number in \[0, inf\), got -1"),
        (("expert", float("nan"), "frobenius"), "guidance.lam"),
        (("expert", float("inf"), "frobenius"), "guidance.lam"),
        (("expert", "auto", "frobenius"), "guidance.lam"),
        (("expert", 0.05, "size"), "guidance.task_weight must be one of frobenius, tokens"),
    ],
)
def test_bad_options_are_refused(fields: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Guidance(*fields)  # type: ignore[arg-type]


def test_a_hessian_without_factor_keeps_the_anchor_as_target() -> None:
    anchor, experts, inputs = problem()
    objective = objective_of(Guidance("expert", 0.0, "frobenius"), anchor, experts, inputs)
    objective.H = -objective.H
    targets, factor = objective.targets()
    assert factor is None
    assert torch.equal(targets[0], anchor)
