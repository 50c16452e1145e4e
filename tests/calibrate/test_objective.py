"""Oracles: the objective written out, least squares of stacked inputs (RegMean), and invariants; all in float64."""

from __future__ import annotations

import pytest
import torch

from epmq_cli.calibrate.objective import Objective
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.quantize.gptq import gptq
from tests.helpers.formats import ints
from tests.helpers.objectives import IN, OUT, TASKS, given_problem, rand, relative


@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("intercepts", [False, True])
@pytest.mark.parametrize("kind", ["frobenius", "tokens"])
@pytest.mark.parametrize("lam", [0.0, 0.05, 2.0])
def test_target_and_bias_minimise_the_written_out_objective(
    lam: float, kind: str, intercepts: bool, rich: bool
) -> None:
    given = given_problem(rich)
    problem = given.problem(lam, intercepts, kind)
    target, factor = problem.solve()
    assert factor is not None
    Q = target.clone().requires_grad_()
    bias = problem.bias(target) if intercepts else None
    b = None if bias is None else bias.clone().requires_grad_()
    given.written_out(Q, b, lam, kind).backward()  # type: ignore[no-untyped-call]
    assert Q.grad is not None
    assert Q.grad.abs().max() < 1e-10
    if intercepts:
        assert b is not None
        assert b.grad is not None
        assert b.grad.abs().max() < 1e-10


@pytest.mark.parametrize("intercepts", [False, True])
def test_without_anchor_the_target_is_least_squares_of_the_stacked_inputs(intercepts: bool) -> None:
    given = given_problem(rich=True)
    roots = [(s * w).sqrt()[:, None] for s, w in zip(given.s(), given.weights, strict=True) if w is not None]
    ones = [torch.ones(len(X), 1, dtype=X.dtype) for X in given.inputs]
    augmented = [torch.cat([X, one], 1) if intercepts else X for X, one in zip(given.inputs, ones, strict=True)]
    outputs = []
    for X, expert, part in zip(given.inputs, given.experts, given.parts, strict=True):
        assert expert.bias is not None
        assert part is not None
        outputs.append(X @ expert.weight.T + part + (expert.bias if intercepts else 0))
    stacked = torch.cat([root * X for root, X in zip(roots, augmented, strict=True)])
    wanted = torch.cat([root * Y for root, Y in zip(roots, outputs, strict=True)])
    direct = torch.linalg.lstsq(stacked, wanted).solution.T
    problem = given.problem(0.0, intercepts)
    target = problem.solve()[0]
    torch.testing.assert_close(target, direct[:, :IN], rtol=1e-8, atol=1e-10)
    if intercepts:
        torch.testing.assert_close(problem.bias(target), direct[:, IN], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("intercepts", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_relative_loss_is_the_written_out_objective_at_the_best_bias(lam: float, intercepts: bool, rich: bool) -> None:
    given = given_problem(rich)
    problem = given.problem(lam, intercepts)
    energy = sum(
        s * ((X @ e.weight.T).square() * (1 if w is None else w[:, None])).sum()
        for s, X, e, w in zip(given.s(), given.inputs, given.experts, given.weights, strict=True)
    )
    for Q in (given.anchor.weight, given.experts[0].weight, rand(OUT, IN, seed=7)):
        bias = problem.bias(Q) if intercepts else None
        expected = float(given.written_out(Q, bias, lam) / energy)
        assert relative(problem, Q) == pytest.approx(expected, rel=1e-9)
        if Q is given.anchor.weight:
            assert float(problem.anchor_loss().sum() / problem.energy().sum()) == pytest.approx(expected, rel=1e-9)


def test_loss_away_from_the_target_is_the_quadratic_form_that_gptq_minimises() -> None:
    given = given_problem(rich=True)
    problem = given.problem(0.05, intercepts=True)
    target, Q = problem.solve()[0], rand(OUT, IN, seed=7)
    form = torch.trace((Q - target) @ problem.H @ (Q - target).T)
    away = given.written_out(Q, problem.bias(Q), 0.05) - given.written_out(target, problem.bias(target), 0.05)
    assert float(away) == pytest.approx(float(form), rel=1e-9)


def test_the_bias_compensates_the_mean_error_of_a_quantized_weight() -> None:
    given = given_problem(rich=True)
    problem = given.problem(0.0, intercepts=True)
    coarse = problem.solve()[0].round()
    bias, surplus, total = problem.bias(coarse), torch.zeros(OUT).double(), 0.0
    assert bias is not None
    for s, X, expert, part, w in zip(given.s(), given.inputs, given.experts, given.parts, given.weights, strict=True):
        assert expert.bias is not None
        assert part is not None
        assert w is not None
        surplus += s * w @ (X @ coarse.T + bias - X @ expert.weight.T - expert.bias - part)
        total += s * float(w.sum())
    assert surplus.abs().max() < 1e-10 * total
    assert relative(problem, coarse) > relative(problem, problem.solve()[0])


@pytest.mark.parametrize("intercepts", [False, True])
def test_experts_equal_to_the_anchor_give_gptq_of_the_merge_bit_for_bit(intercepts: bool) -> None:
    given = given_problem()
    given.experts = [given.anchor] * TASKS
    problem = given.problem(0.0, intercepts)
    target, bias = problem.solve()[0], problem.bias(problem.solve()[0])
    assert torch.equal(target, given.anchor.weight)
    assert (bias is not None) is intercepts
    assert bias is None or torch.equal(bias, given.anchor.bias)  # type: ignore[arg-type]
    H, h, N = torch.zeros(IN, IN).double(), torch.zeros(IN).double(), 0.0
    for s, X in zip(given.s(), given.inputs, strict=True):
        H, h, N = H + s * (X.T @ X), h + s * X.sum(0), N + s * len(X)
    if intercepts:
        H = H - torch.outer(h, h) / N
    found, reference = (
        gptq(weight.float(), hessian, ints(4, 4), "mse", torch.float32, 0.01, 128, False).weight.dequantize()
        for weight, hessian in ((target, problem.H), (given.anchor.weight, H))
    )
    assert torch.equal(found, reference)
    assert not torch.equal(found, given.anchor.weight.float())
    assert relative(problem, target) == 0


@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_intercepts_centre_the_inputs(lam: float) -> None:
    """Without an anchor, H is that of inputs minus their weighted mean; with one, that of inputs plus a row of zeros
    of weight lam."""
    given = given_problem(rich=True)
    roots = [(s * w).sqrt()[:, None] for s, w in zip(given.s(), given.weights, strict=True) if w is not None]
    rows = torch.cat([*(root * X for root, X in zip(roots, given.inputs, strict=True)), torch.zeros(1, IN).double()])
    ones = torch.cat([*roots, torch.full((1, 1), lam**0.5).double()])
    centred = rows - ones @ (ones.T @ rows) / ones.square().sum()
    wanted = centred.T @ centred + lam * torch.eye(IN).double()
    torch.testing.assert_close(given.problem(lam, intercepts=True).H, wanted)


def test_a_strong_anchor_gives_the_anchor() -> None:
    given = given_problem(rich=True)
    problem = given.problem(1e9, intercepts=True)
    target = problem.solve()[0]
    torch.testing.assert_close(target, given.anchor.weight, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(problem.bias(target), given.anchor.bias, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("intercepts", [False, True])
def test_one_expert_without_anchor_is_that_expert(intercepts: bool) -> None:
    given = given_problem()
    given.inputs, given.experts = given.inputs[:1], given.experts[:1]
    given.parts, given.weights = [None], [None]
    problem = given.problem(0.0, intercepts)
    target = problem.solve()[0]
    torch.testing.assert_close(target, given.experts[0].weight, rtol=1e-9, atol=1e-9)
    if intercepts:
        torch.testing.assert_close(problem.bias(target), given.experts[0].bias, rtol=1e-8, atol=1e-8)


def test_order_of_tasks_changes_nothing() -> None:
    given, turned = given_problem(rich=True), given_problem(rich=True)
    for values in (turned.experts, turned.inputs, turned.parts, turned.weights):
        values.reverse()  # type: ignore[attr-defined]
    forward, backward = (p.problem(0.05, True).solve()[0] for p in (given, turned))
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-12)


def test_frobenius_weights_make_the_scale_of_a_task_irrelevant() -> None:
    given, scaled = given_problem(), given_problem()
    scaled.inputs[0] = 100 * scaled.inputs[0]
    plain, other = (p.problem(0.05, False).solve()[0] for p in (given, scaled))
    torch.testing.assert_close(plain, other, rtol=1e-9, atol=1e-11)


def test_dead_columns_keep_the_anchor() -> None:
    given = given_problem()
    for rows in given.inputs:
        rows[:, 2] = 0
    target, factor = given.problem(0.0, intercepts=False).solve()
    assert factor is not None
    assert factor.damping == 0
    assert torch.equal(target[:, 2], given.anchor.weight[:, 2])
    assert not torch.equal(target[:, 3], given.anchor.weight[:, 3])


@pytest.mark.parametrize("intercepts", [False, True])
def test_fewer_tokens_than_inputs_give_a_finite_target_and_report_the_damping(intercepts: bool) -> None:
    given = given_problem()
    given.inputs = [rows[:1] for rows in given.inputs]
    target, factor = given.problem(0.0, intercepts).solve()
    assert factor is not None
    assert factor.damping > 0
    assert torch.isfinite(target).all()


def test_all_zero_inputs_keep_the_anchor() -> None:
    given = given_problem()
    given.inputs = [0 * rows for rows in given.inputs]
    problem = given.problem(0.0, intercepts=False)
    assert torch.equal(problem.solve()[0], given.anchor.weight)
    assert relative(problem, given.anchor.weight) == 0


def test_a_hessian_without_factor_keeps_the_anchor_as_target() -> None:
    given = given_problem()
    objective = Objective(given.anchor, 0.0, intercepts=False)
    for moments, expert in zip(given.moments(), given.experts, strict=True):
        objective.add(moments, expert, -1.0)
    target, factor = objective.closed().solve()
    assert factor is None
    assert torch.equal(target, given.anchor.weight)


@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_a_linear_without_bias_gets_none(lam: float) -> None:
    given, biased = given_problem(), given_problem()
    given.anchor = Affine(given.anchor.weight, None)
    given.experts = [Affine(expert.weight, None) for expert in given.experts]
    problem = given.problem(lam, intercepts=False)
    target = problem.solve()[0]
    assert problem.bias(target) is None
    assert torch.equal(target, biased.problem(lam, intercepts=False).solve()[0])


def test_a_task_of_weight_zero_has_no_effect() -> None:
    given, without = given_problem(rich=True), given_problem(rich=True)
    for values in (without.experts, without.inputs, without.parts, without.weights):
        del values[1]  # type: ignore[attr-defined]
    objective = Objective(given.anchor, 0.05, intercepts=True)
    for moments, expert, s in zip(given.moments(), given.experts, (given.s()[0], 0.0, given.s()[2]), strict=True):
        objective.add(moments, expert, s)
    torch.testing.assert_close(objective.closed().solve()[0], without.problem(0.05, intercepts=True).solve()[0])
