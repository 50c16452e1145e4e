"""Oracle: the written-out objective of the held-out tokens on a fine grid of steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.block_refinement import Chunks
from epmq_cli.calibrate.held_out_step import best_step
from tests.helpers.hubs import walk
from tests.helpers.minihub import hub_of
from tests.helpers.objectives import Given, given_problem, rand
from tests.helpers.tiers import first, slow

RIDGE = 1e-9  # a problem needs a factor


def least(given: Given, intercepts: bool, weight: Tensor) -> float:
    """J of a weight with its best bias."""
    bias = given.problem(RIDGE, intercepts).bias(weight) if intercepts else None
    return float(given.written_out(weight, bias, 0.0))


@pytest.mark.parametrize("intercepts", [False, True])
def test_the_step_has_the_least_error_on_held_out_tokens(intercepts: bool) -> None:
    given, held = given_problem(rich=True), given_problem(rich=True)
    held.inputs = [rows.flip(1) for rows in given.inputs]
    merged = given.anchor.weight + 0.1 * rand(*given.anchor.weight.shape, seed=7)
    fitted = given.problem(0.05, intercepts)
    target = fitted.solve()[0]
    step = best_step(target, held.problem(0.0, intercepts), merged)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    losses = [least(held, intercepts, merged + float(share) * (target - merged)) for share in grid]
    assert 0 < step.share < 1
    assert abs(step.share - float(grid[losses.index(min(losses))])) <= 0.01
    torch.testing.assert_close(step.towards(target), merged + step.share * (target - merged))


def test_tokens_that_agree_give_the_whole_step_and_no_step_if_the_merge_is_better() -> None:
    given = given_problem()
    problem, anchor = given.problem(RIDGE, False), given.anchor.weight
    solution = problem.solve()[0]
    assert best_step(solution, given.problem(0.0, False), anchor).share == pytest.approx(1)
    assert best_step(solution, problem, solution).share == 1
    given.experts = [given.anchor] * 3
    best = best_step(solution, given.problem(0.0, False), anchor)
    assert best.share == 0
    assert torch.equal(best.towards(solution), anchor)


def test_views_of_a_sample_are_held_out_with_it() -> None:
    batches = {"one": [{"x": torch.arange(7).repeat(3)}, {"x": torch.arange(7, 11).repeat(3)}]}
    for samples in (2, 100):
        chunks = Chunks(batches, samples, 5, views=3)
        parts, held = chunks.parts()["one"], chunks.held("one")
        assert [len(part["x"]) for part in parts] == [len(mask) for mask in held]
        chosen = torch.cat([part["x"][mask] for part, mask in zip(parts, held, strict=True)])
        assert sorted(chosen.tolist()) == [4, 4, 4, 9, 9, 9]


SAFE = ("guidance.safe=true", "quant=none")


@pytest.fixture(scope="module")
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_of("llama", request, tmp_path_factory.mktemp("llama") / "hub")


@pytest.mark.parametrize("kind", first(1, ("bert", "clip", "t5", "vit", "modernbert", "deberta", "llama")))
def test_the_same_samples_are_held_out_in_batches_of_any_size(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub = hub_of(kind, request, tmp_path / "hub")
    found, others = (
        [record.step or 0.0 for record in walk(hub, *SAFE, *options).walked.records]
        for options in ((), ("calib.batch_size=3",))
    )
    assert found
    assert all(0 <= step <= 1 for step in found)
    assert others == pytest.approx(found, abs=0.02)


@pytest.mark.parametrize("guidance", ["feature", slow("expert"), slow("asymmetric")])
def test_too_few_samples_to_hold_out_take_the_whole_step(guidance: str, llama: Path) -> None:
    options = (f"guidance={guidance}", "calib.samples=4", "quant=none")
    found, plain = (walk(llama, *options, f"guidance.safe={safe}") for safe in ("true", "false"))
    assert {record.step for record in found.walked.records} == {1.0}
    assert {record.step for record in plain.walked.records} == {None}
    for name, tensor in found.student.state_dict().items():
        torch.testing.assert_close(tensor, plain.student.state_dict()[name], rtol=1e-3, atol=1e-4)
