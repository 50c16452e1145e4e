"""The loops of TIES over the elements of a piece, compiled by numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from epmq_cli.runtime.jit import compiled

BLOCK = 1024


@compiled
def count_upper(values: Any, counts: Any) -> None:
    """Adds to `counts` (65536,) the upper 16 bits of the magnitudes of float32 values."""
    bits = values.view(np.int32)
    for i in range(len(bits)):
        counts[(bits[i] & 0x7FFFFFFF) >> 16] += 1


@compiled
def count_lower(values: Any, high: Any, counts: Any) -> None:
    """Adds to `counts` (65536,) the lower 16 bits of the magnitudes whose upper 16 are `high`."""
    bits = values.view(np.int32)
    for i in range(len(bits)):
        if (bits[i] & 0x7FFFFFFF) >> 16 == high:
            counts[bits[i] & 0xFFFF] += 1


@compiled
def trim(base: Any, expert: Any, threshold: Any, weight: Any, trimmed: Any, total: Any, number: Any) -> None:
    """Writes a task vector (n,), with zeros below its threshold, times `weight` to `trimmed`; adds it to `total`, and
    adds 1 to `number` for each nonzero element."""
    zero, one = np.float32(0), np.float32(1)
    for i in range(len(base)):
        value = expert[i] - base[i]
        value = weight * value if abs(value) >= threshold else zero
        trimmed[i] = value
        total[i] += value
        number[i] += one if value != zero else zero


@compiled
def sum_signs(base: Any, experts: Any, thresholds: Any, weights: Any, signs: Any) -> None:
    """Adds to `signs` (1,) the signs of the sums of the trimmed task vectors, each times its weight.

    `base` (n,) and `experts` (experts, n).
    """
    trimmed, totals, numbers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(0, len(base), BLOCK):
        part = base[start : start + BLOCK]
        n = len(part)
        total, number = totals[:n], numbers[:n]
        total[:] = np.float32(0)
        number[:] = np.float32(0)
        for k in range(len(experts)):
            trim(part, experts[k, start : start + n], thresholds[k], weights[k], trimmed[:n], total, number)
        balance = 0
        for i in range(n):
            balance += int(total[i] > 0) - int(total[i] < 0)
        signs[0] += balance


@compiled
def elect(
    base: Any, experts: Any, thresholds: Any, weights: Any, majority: Any, scale: Any, mean: Any, merged: Any
) -> None:
    """Trims, elects and merges the elements of `base` (n,) and `experts` (experts, n) into `merged` (n,).

    `weights` (experts,): factors on the task vectors. `majority`: the sign of elements whose task vectors cancel.
    `mean`: divides the sum of the values that agree with the sign by that of the magnitudes of their weights.
    Each step is a loop without branches over `BLOCK` elements, so that it is vectorised and stays in the nearest cache.
    """
    tasks, zero, one = len(experts), np.float32(0), np.float32(1)
    every = np.empty((tasks, BLOCK), np.float32)
    totals, sums, numbers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(0, len(base), BLOCK):
        part, output = base[start : start + BLOCK], merged[start : start + BLOCK]
        n = len(part)
        total, agreed, number = totals[:n], sums[:n], numbers[:n]
        total[:] = zero
        number[:] = zero
        for k in range(tasks):
            trim(part, experts[k, start : start + n], thresholds[k], weights[k], every[k, :n], total, number)
        for i in range(n):
            sign = (one if total[i] > zero else zero) - (one if total[i] < zero else zero)
            total[i] = majority if sign == zero and number[i] > zero else sign
        agreed[:] = zero
        number[:] = zero
        for k in range(tasks):
            agree(every[k, :n], total, abs(weights[k]), agreed, number)
        for i in range(n):
            value = agreed[i] / (number[i] if number[i] > zero else one) if mean else agreed[i]
            output[i] = part[i] + scale * value


@compiled
def agree(trimmed: Any, sign: Any, weight: Any, agreed: Any, number: Any) -> None:
    """Adds the elements of a trimmed task vector (n,) that have this sign to `agreed`, and adds `weight` to `number`
    for each."""
    zero = np.float32(0)
    for i in range(len(trimmed)):
        same = trimmed[i] * sign[i] > zero
        agreed[i] += trimmed[i] if same else zero
        number[i] += weight if same else zero
