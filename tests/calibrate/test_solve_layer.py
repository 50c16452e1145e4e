"""Oracles: each linear solved on its own, and the objective's own losses; in float64 up to the quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.moments import Measure, Moments
from epmq_cli.calibrate.objective import Objective
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.calibrate.solve_layer import InputRange, solve
from epmq_cli.quantize.formats.format import QuantizedWeight
from epmq_cli.quantize.formats.names import FIXED
from epmq_cli.quantize.gptq import Gptq
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.rtn import Rtn
from tests.helpers.formats import ints

IN, OUTS, NAMES = 8, (6, 3), ("query", "key")
DTYPE = torch.float32
SEEN = InputRange(30, 4.48)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(indices: tuple[int, ...] = (0, 1), scale: float = 1, lam: float = 0.1) -> Objective:
    """The objective of the linears at `indices` of two, with one expert and 30 tokens."""
    anchors = [Affine(rand(OUTS[index], IN, seed=index), None) for index in indices]
    experts = [Affine(a.weight + rand(*a.weight.shape, seed=9), None) for a in anchors]
    found, measure, X = Objective(Affine.stacked(anchors), lam, intercepts=False), Measure(), rand(30, IN, seed=5)
    measure.add(scale * X, None, None)
    found.add(measure.moments(), Affine.stacked(experts), 1 / 30)
    return found


def rtn() -> Rtn:
    return Rtn(ints(3, 4), "mse")


def test_a_group_equals_its_linears_solved_one_by_one() -> None:
    together, _ = solve(objective().closed(), NAMES, list(OUTS), SEEN, rtn(), DTYPE)
    for index, solution in enumerate(together):
        alone, _ = solve(objective((index,)).closed(), NAMES[:1], [OUTS[index]], SEEN, rtn(), DTYPE)
        assert isinstance(solution.weight, QuantizedWeight)
        assert torch.equal(solution.weight.dequantize(), alone[0].weight.dequantize())


def test_blocks_of_rows_begin_with_each_linear() -> None:
    """A group equals its linears alone, where 128 rows share a scale and linears have 130 and 100."""
    outs, X = [130, 100], rand(200, 128, seed=5)
    anchors = [Affine(rand(out, 128, seed=out), None) for out in outs]
    quantizer = Gptq(FIXED["fp8_block"], "hessian", 0.01, 128, False)

    def solved(parts: list[Affine], sizes: list[int]) -> list[Tensor]:
        given, measure = Objective(Affine.stacked(parts), 0.1, intercepts=False), Measure()
        measure.add(X, None, None)
        given.add(measure.moments(), Affine.stacked(parts), 1.0)
        found, records = solve(given.closed(), NAMES[: len(sizes)], sizes, SEEN, quantizer, DTYPE)
        assert all(record.loss is not None and 0 < record.loss < 1e-2 for record in records)
        weights = [solution.weight for solution in found if isinstance(solution.weight, QuantizedWeight)]
        assert [len(weight.grid.scale.unique()) for weight in weights] == [-(-size // 128) for size in sizes]
        return [weight.dequantize() for weight in weights]

    alone = [*solved(anchors[:1], outs[:1]), *solved(anchors[1:], outs[1:])]
    assert all(torch.equal(*pair) for pair in zip(solved(anchors, outs), alone, strict=True))


def test_the_largest_input_sets_the_scale_of_static_inputs() -> None:
    for name, wanted in (("fp8_static", 0.01), ("nvfp4", 600.0)):
        given, measure = Objective(Affine(rand(6, 16, seed=0), None), 0.1, intercepts=False), Measure()
        measure.add(rand(30, 16, seed=5), None, None)
        given.add(measure.moments(), Affine(rand(6, 16, seed=1), None), 1.0)
        found, _ = solve(given.closed(), NAMES[:1], [6], SEEN, Rtn(FIXED[name], "minmax"), DTYPE)
        weight = found[0].weight
        assert isinstance(weight, QuantizedWeight)
        own = weight.format.input_scale if name == "fp8_static" else weight.format.input_global_scale  # type: ignore[attr-defined]
        assert own == pytest.approx(wanted)


def test_without_quantizer_the_weights_are_the_targets() -> None:
    problem = objective().closed()
    found, records = solve(problem, NAMES, list(OUTS), SEEN, NoQuantizer(), DTYPE)
    for solution, target in zip(found, problem.solve()[0].split(OUTS), strict=True):
        assert torch.equal(solution.weight.dequantize(), target.float())
    assert [record.bits for record in records] == [None, None]


def test_records_hold_the_losses_of_anchor_target_and_result() -> None:
    problem = objective().closed()
    found, records = solve(problem, NAMES, list(OUTS), SEEN, rtn(), DTYPE)
    energies, result = problem.energy().split(OUTS), torch.cat([solution.weight.dequantize() for solution in found])
    solution = problem.solve()
    losses = (problem.anchor_loss(), problem.loss(solution[0], *solution), problem.loss(result, *solution))
    for index, record in enumerate(records):
        wanted = [float(loss.split(OUTS)[index].sum() / energies[index].sum()) for loss in losses]
        assert (record.name, record.tokens, record.bits, record.fallback) == (NAMES[index], 30, 3, None)
        assert [record.loss_merged, record.loss_target, record.loss] == pytest.approx(wanted)
        assert record.loss_target < record.loss < record.loss_merged
        exact = torch.linalg.cond(problem.H)
        assert record.condition == pytest.approx(float(exact), rel=0.05)
        assert record.condition <= exact * (1 + 1e-9)


def test_the_target_is_the_anchor_without_a_factor_if_all_experts_equal_it() -> None:
    anchor = Affine(rand(6, IN, seed=0), None)
    given, measure = Objective(anchor, 0.0, intercepts=False), Measure()
    measure.add(rand(40, IN, seed=5), None, None)
    given.add(measure.moments(), anchor, 1.0)
    problem = given.closed()
    _, records = solve(problem, NAMES[:1], [6], InputRange(40, 3.0), rtn(), DTYPE)
    assert torch.equal(problem.solve()[0], anchor.weight)
    assert (records[0].target_damping, records[0].condition, records[0].loss_target) == (0, None, 0)
    assert records[0].loss > 0


def test_a_hessian_without_factor_is_recorded() -> None:
    given = objective(lam=0.0)
    anchor = given.closed().anchor
    given.add(_negative(), anchor, 1.0)
    problem = given.closed()
    found, records = solve(problem, NAMES, list(OUTS), SEEN, NoQuantizer(), DTYPE)
    assert [record.target_damping for record in records] == [None, None]
    assert [record.condition for record in records] == [None, None]
    assert torch.equal(found[0].weight.dequantize(), problem.anchor.weight[: OUTS[0]].float())


def _negative() -> Moments:
    zero = torch.zeros((), dtype=torch.float64)
    return Moments(-100 * torch.eye(IN, dtype=torch.float64), 1.0, torch.zeros(IN).double(), 0.0, zero, zero, zero)


def test_raised_damping_is_counted() -> None:
    given, measure = Objective(Affine(rand(6, IN, seed=0), None), 0.0, intercepts=False), Measure()
    measure.add(rand(2, IN, seed=5), None, None)  # two tokens for eight inputs
    given.add(measure.moments(), Affine(rand(6, IN, seed=1), None), 1.0)
    problem = given.closed()
    _, records = solve(problem, NAMES[:1], [6], InputRange(2, 3.0), NoQuantizer(), DTYPE)
    assert records[0].damping_retries > 0
    assert records[0].target_damping is not None
    assert records[0].target_damping > 0
