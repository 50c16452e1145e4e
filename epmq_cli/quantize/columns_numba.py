"""GPTQ's loop over columns for the CPU: one row after the other in the processor's cache, compiled by numba when first
used; the machine code is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epmq_cli.compiled import compiled
from epmq_cli.quantize.grid import Grid, GridSpec

LEAST = 64  # rows that are worth a thread


@compiled
def _walk(W: Any, U: Any, scale: Any, zero: Any, low: Any, high: Any, values: Any, errors: Any) -> None:
    rows, columns = W.shape
    w = np.empty(columns, W.dtype)
    for row in range(rows):
        s, z = scale[row], zero[row]
        w[:] = W[row]
        for i in range(columns):
            q = min(max(np.rint(w[i] / s) + z, low), high)
            error = (w[i] - (q - z) * s) / U[i, i]
            for j in range(i + 1, columns):
                w[j] -= error * U[i, j]
            values[row, i] = q
            errors[row, i] = error


@compiled
def _loss(W: Any, U: Any, scale: Any, zero: Any, low: Any, high: Any, total: Any) -> None:
    rows, columns = W.shape
    candidates = scale.shape[1]
    w = np.empty((columns, candidates), W.dtype)
    error = np.empty(candidates, W.dtype)
    for row in range(rows):
        s, z, sums = scale[row], zero[row], total[row]
        for i in range(columns):
            for c in range(candidates):
                w[i, c] = W[row, i]
        for i in range(columns):
            d = U[i, i]
            for c in range(candidates):
                q = min(max(np.rint(w[i, c] / s[c]) + z[c], low), high)
                error[c] = (w[i, c] - (q - z[c]) * s[c]) / d
                sums[c] += error[c] * error[c]
            for j in range(i + 1, columns):
                u = U[i, j]
                for c in range(candidates):
                    w[j, c] -= u * error[c]


class NumbaColumns:
    """See columns.py; rows are shared out to as many threads as torch uses."""

    def walk(self, weight: Tensor, U: Tensor, grid: Grid, spec: GridSpec) -> tuple[Tensor, Tensor]:
        """See columns.py."""
        values, errors = torch.empty(weight.shape), torch.empty(weight.shape)
        inputs = (weight, U, grid.scale[:, 0], grid.zero[:, 0])
        _by_rows(_walk, inputs, spec, (values, errors))
        return values, errors

    def loss(self, weight: Tensor, U: Tensor, grid: Grid, spec: GridSpec) -> Tensor:
        """See columns.py."""
        total = torch.zeros(len(weight), len(grid.scale))
        _by_rows(_loss, (weight, U, grid.scale.T, grid.zero.T), spec, (total,))
        return total.T


def _by_rows(
    kernel: Callable[..., None],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    spec: GridSpec,
    outputs: tuple[Tensor, ...],
) -> None:
    W, U, scale, zero = (tensor.contiguous().numpy() for tensor in inputs)
    low, high, found = np.float32(spec.lowest), np.float32(spec.highest), [tensor.numpy() for tensor in outputs]
    threads = max(1, min(torch.get_num_threads(), len(W) // LEAST))
    bounds = [len(W) * part // threads for part in range(threads + 1)]

    def work(start: int, end: int) -> None:
        part = slice(start, end)
        kernel(W[part], U, scale[part], zero[part], low, high, *(out[part] for out in found))

    if threads == 1:
        work(0, len(W))
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, *bound) for bound in pairwise(bounds)]:
            done.result()
