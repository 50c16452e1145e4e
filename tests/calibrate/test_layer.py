"""Oracles: each linear solved alone, and the objective's own losses; in float64 up to the quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.layer import solve
from epmq_cli.calibrate.moments import Measure, Moments
from epmq_cli.calibrate.objective import Affine, Objective
from epmq_cli.quantize.grid import QuantizedWeight
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.rtn import Rtn

IN, OUTS, NAMES = 8, (6, 3), ("query", "key")
DTYPE = torch.float32


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(indices: tuple[int, ...] = (0, 1), scale: float = 1, lam: float = 0.1) -> Objective:
    """That of some of two linears with one expert and 30 tokens."""
    anchors = [Affine(rand(OUTS[index], IN, seed=index), None) for index in indices]
    experts = [Affine(a.weight + rand(*a.weight.shape, seed=9), None) for a in anchors]
    found, measure, X = Objective(anchors, lam, intercepts=False), Measure(len(anchors)), rand(30, IN, seed=5)
    measure.add(scale * X, [None] * len(anchors), None)
    found.add(measure.moments(), experts, 1 / 30)
    return found


def rtn() -> Rtn:
    return Rtn(bits=3, group_size=4, symmetric=True, grid="mse")


def test_linears_of_a_group_are_those_solved_alone() -> None:
    together, _ = solve(objective(), NAMES, 30, rtn(), DTYPE)
    for index, weight in enumerate(together):
        alone, _ = solve(objective((index,)), NAMES[:1], 30, rtn(), DTYPE)
        assert isinstance(weight, QuantizedWeight)
        assert torch.equal(weight.dequantize(), alone[0].dequantize())


def test_without_quantizer_the_weights_are_the_targets() -> None:
    given = objective()
    found, records = solve(given, NAMES, 30, NoQuantizer(), DTYPE)
    for weight, target in zip(found, given.targets()[0], strict=True):
        assert torch.equal(weight.dequantize(), target.float())
    assert [record.bits for record in records] == [None, None]


def test_records_hold_the_losses_of_anchor_target_and_result() -> None:
    given = objective()
    found, records = solve(given, NAMES, 30, rtn(), DTYPE)
    targets = given.targets()[0]
    for index, record in enumerate(records):
        assert (record.name, record.tokens, record.bits, record.fallback) == (NAMES[index], 30, 3, None)
        assert record.loss_merged == given.anchor_loss(index)
        assert record.loss_target == given.relative_loss(index, targets[index])
        assert record.loss == given.relative_loss(index, found[index].dequantize())
        assert record.loss_target < record.loss < record.loss_merged
        exact = torch.linalg.cond(given.hessian)
        assert record.condition == pytest.approx(float(exact), rel=0.05)
        assert record.condition <= exact * (1 + 1e-9)


def test_where_nothing_pulls_away_from_the_anchor_it_is_the_target_and_needs_no_factor() -> None:
    anchors = [Affine(rand(6, IN, seed=0), None)]
    given, measure = Objective(anchors, 0.0, intercepts=False), Measure(1)
    measure.add(rand(40, IN, seed=5), [None], None)
    given.add(measure.moments(), anchors, 1.0)
    _, records = solve(given, NAMES[:1], 40, rtn(), DTYPE)
    assert torch.equal(given.targets()[0][0], anchors[0].weight.double())
    assert (records[0].target_damping, records[0].condition, records[0].loss_target) == (0, None, 0)
    assert records[0].loss > 0


def test_a_hessian_without_factor_is_recorded_as_such() -> None:
    given = objective(lam=0.0)
    given.add(_negative(), [Affine(a.weight, None) for a in given.anchors], 1.0)
    found, records = solve(given, NAMES, 30, NoQuantizer(), DTYPE)
    assert [record.target_damping for record in records] == [None, None]
    assert [record.condition for record in records] == [None, None]
    assert torch.equal(found[0].dequantize(), given.anchors[0].weight.float())


def _negative() -> Moments:
    zero = torch.zeros((), dtype=torch.float64)
    empty = [zero] * len(OUTS)
    return Moments(-100 * torch.eye(IN, dtype=torch.float64), torch.zeros(IN).double(), 0.0, empty, empty, empty)


def test_damping_that_had_to_be_raised_is_counted() -> None:
    anchors = [Affine(rand(6, IN, seed=0), None)]
    given, measure = Objective(anchors, 0.0, intercepts=False), Measure(1)
    measure.add(rand(2, IN, seed=5), [None], None)  # two tokens for eight inputs
    given.add(measure.moments(), [Affine(rand(6, IN, seed=1), None)], 1.0)
    _, records = solve(given, NAMES[:1], 2, NoQuantizer(), DTYPE)
    assert records[0].damping_retries > 0
    assert records[0].target_damping is not None
    assert records[0].target_damping > 0
