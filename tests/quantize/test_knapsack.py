"""Oracles: exhaustive search, and the limit."""

from __future__ import annotations

import itertools

import pytest
import torch

from epmq_cli.quantize.knapsack import STEPS, allocate

Table = dict[str, list[float]]
Costs = dict[str, list[int]]


def drawn(seed: int, items: int, unit: int) -> tuple[Table, Costs]:
    """Random losses and costs of three choices, which are multiples of the unit."""
    generator = torch.Generator().manual_seed(seed)
    names = [str(item) for item in range(items)]
    losses = {name: torch.rand(3, generator=generator).tolist() for name in names}
    costs = {name: (unit * torch.randint(1, 30, (3,), generator=generator)).tolist() for name in names}
    return losses, costs


def best(losses: Table, costs: Costs, limit: int) -> float:
    """The least sum of losses over all allocations within the limit."""
    found = [
        sum(losses[item][index] for item, index in zip(losses, choice, strict=True))
        for choice in itertools.product(*(range(len(own)) for own in losses.values()))
        if sum(costs[item][index] for item, index in zip(losses, choice, strict=True)) <= limit
    ]
    return min(found)


def sums(table: Table | Costs, found: dict[str, int]) -> float:
    return sum(table[item][index] for item, index in found.items())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("unit", [1, 4096])
def test_the_result_is_the_best_of_all_allocations(seed: int, unit: int) -> None:
    losses, costs = drawn(seed, 6, unit)
    low, high = (sum(map(pick, costs.values())) for pick in (min, max))
    for limit in (low, (2 * low + high) // 3, (low + high) // 2, high, 2 * high):
        found = allocate(losses, costs, limit)
        assert sums(costs, found) <= limit
        assert sums(losses, found) == pytest.approx(best(losses, costs, limit), abs=1e-12)


def test_costs_without_a_common_divisor_stay_near_the_best() -> None:
    """A limit that is smaller by what rounding up can add has no better allocation."""
    losses, costs = drawn(0, 6, 10_000_019)
    costs = {item: [cost + 7 * index for index, cost in enumerate(own)] for item, own in costs.items()}
    limit = (sum(map(min, costs.values())) + sum(map(max, costs.values()))) // 2
    found = allocate(losses, costs, limit)
    room = limit - sum(map(min, costs.values()))
    assert sums(costs, found) <= limit
    assert sums(losses, found) <= best(losses, costs, limit - 6 * (room // STEPS + 1)) + 1e-12


def test_equal_losses_take_the_lowest_cost() -> None:
    assert allocate({"a": [1.0, 1.0], "b": [2.0, 0.5]}, {"a": [5, 1], "b": [1, 9]}, 100) == {"a": 1, "b": 1}


def test_a_limit_below_the_lowest_costs_is_an_error() -> None:
    with pytest.raises(ValueError, match="the lowest costs exceed the limit by 2"):
        allocate({"a": [1.0, 0.0]}, {"a": [5, 9]}, 3)
