"""The knapsack problem with several choices: one choice for each item, so that the sum of the losses is least and the
costs fit a limit.

Dynamic programming over the cost. It is exact if the costs have a large common divisor, as those of linears have: they
are multiples of a width or of the bytes of a row. Otherwise costs are rounded up to 1 / `STEPS` of the range.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

STEPS = 1 << 16
"""The most costs that are told apart."""

Item = TypeVar("Item", bound=Hashable)


def allocate(
    losses: Mapping[Item, Sequence[float]], costs: Mapping[Item, Sequence[int]], limit: int
) -> dict[Item, int]:
    """The index of the choice of each item. Of equal losses the lowest cost is taken.

    `losses`, `costs`: of each choice of an item; ValueError if even the lowest costs exceed the limit.
    """
    least = {item: min(costs[item]) for item in losses}
    extra = {item: [cost - least[item] for cost in costs[item]] for item in losses}
    room = min(limit - sum(least.values()), sum(map(max, extra.values())))
    if room < 0:
        raise ValueError(f"the lowest costs exceed the limit by {-room}")
    unit = math.gcd(*(cost for own in extra.values() for cost in own)) or 1
    unit *= max(1, math.ceil(room / unit / STEPS))
    steps = {item: [math.ceil(cost / unit) for cost in own] for item, own in extra.items()}
    size = room // unit + 1
    best, chosen = np.zeros(size), []  # by the cost of the items so far, in units
    for item, own in steps.items():
        lowest, choices = np.full(size, np.inf), np.zeros(size, np.int16)
        for index in sorted(range(len(own)), key=own.__getitem__):
            step = own[index]
            if step < size:
                sums = best[: size - step] + losses[item][index]
                better = sums < lowest[step:]
                lowest[step:][better], choices[step:][better] = sums[better], index
        best = lowest
        chosen.append(choices)
    found, left = dict[Item, int](), int(np.argmin(best))
    for item, choices in zip(reversed(steps), reversed(chosen), strict=True):
        found[item] = int(choices[left])
        left -= steps[item][found[item]]
    return {item: found[item] for item in losses}
