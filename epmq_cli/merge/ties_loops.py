"""The loops of TIES over the elements of a piece, in machine code."""

from __future__ import annotations

from typing import Any

import numpy as np

from epmq_cli.compiled import compiled

BLOCK = 1024


@compiled
def count_upper(values: Any, counts: Any) -> None:
    """Adds to `counts` (65536,) the upper 16 bits of the magnitudes of float32 values."""
    bits = values.view(np.int32)
    for i in range(len(bits)):
        counts[(bits[i] & 0x7FFFFFFF) >> 16] += 1


@compiled
def count_lower(values: Any, high: Any, counts: Any) -> None:
    """Adds to `counts` (65536,) the lower 16 bits of those magnitudes whose upper 16 are `high`."""
    bits = values.view(np.int32)
    for i in range(len(bits)):
        if (bits[i] & 0x7FFFFFFF) >> 16 == high:
            counts[bits[i] & 0xFFFF] += 1


@compiled
def elect(
    base: Any, experts: Any, thresholds: Any, majority: Any, scale: Any, mean: Any, merged: Any, counts: Any
) -> None:
    """Trims, elects and merges the elements of `base` (n,) and `experts` (experts, n) into `merged` (n,).

    `majority`: the sign where task vectors cancel. `mean`: whether those that agree are averaged. `counts` (2,): how
    often they cancelled is added to the first, the elected signs to the second. Steps without branches over `BLOCK`
    elements at a time, so that they are vectorised and stay in the nearest cache.
    """
    tasks, zero, one = len(experts), np.float32(0), np.float32(1)
    kept = np.empty((tasks, BLOCK), np.float32)
    total, agreed, number = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(0, len(base), BLOCK):
        n = min(BLOCK, len(base) - start)
        total[:] = zero
        number[:] = zero  # of task vectors that are not zero
        for k in range(tasks):
            for i in range(n):
                value = experts[k, start + i] - base[start + i]
                value = value if abs(value) >= thresholds[k] else zero
                kept[k, i] = value
                total[i] += value
                number[i] += one if value != zero else zero
        cancelled, signs = 0, 0
        for i in range(n):
            sign = (one if total[i] > zero else zero) - (one if total[i] < zero else zero)
            signs += int(sign)
            tied = sign == zero and number[i] > zero
            cancelled += 1 if tied else 0
            total[i] = majority if tied else sign
        counts[0] += cancelled
        counts[1] += signs
        agreed[:] = zero
        number[:] = zero
        for k in range(tasks):
            for i in range(n):
                same = kept[k, i] * total[i] > zero
                agreed[i] += kept[k, i] if same else zero
                number[i] += one if same else zero
        for i in range(n):
            value = agreed[i] / max(number[i], one) if mean else agreed[i]
            merged[start + i] = base[start + i] + scale * value
