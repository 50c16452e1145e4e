"""GPTQ's loop over columns on the CPU: row by row in the processor's cache, compiled by numba at first use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epmq_cli.quantize.formats.format import Grid, NumberFormat
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.runtime.jit import compiled

LEAST = 64  # minimum rows per thread
LANES = 32  # candidates tried at once: 128 columns of them fit into the L1 cache
STRIP = 4  # columns whose errors are spread in one pass; `_loss` unrolls them


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
def _strip(w: Any, U: Any, s: Any, z: Any, low: Any, high: Any, start: int, errors: Any, sums: Any) -> None:
    """Quantizes up to `STRIP` columns from `start` on, and spreads the error of each over the rest of the strip."""
    end = min(start + STRIP, len(w))
    for i in range(start, end):
        d, here, error = U[i, i], w[i], errors[i - start]
        for c in range(LANES):
            q = min(max(np.rint(here[c] / s[c]) + z[c], low), high)
            error[c] = (here[c] - (q - z[c]) * s[c]) / d
            sums[c] += error[c] * error[c]
        for j in range(i + 1, end):
            u, ahead = U[i, j], w[j]
            for c in range(LANES):
                ahead[c] -= u * error[c]


@compiled
def _loss(W: Any, U: Any, scale: Any, zero: Any, low: Any, high: Any, total: Any) -> None:
    """Places candidates of several rows side by side, so that few candidates also fill the SIMD vectors."""
    columns, candidates, count = W.shape[1], scale.shape[1], scale.size
    scales, zeros, totals = scale.reshape(count), zero.reshape(count), total.reshape(count)
    w, errors = np.empty((columns, LANES), W.dtype), np.zeros((STRIP, LANES), W.dtype)
    s, z, sums = np.ones(LANES, W.dtype), np.zeros(LANES, W.dtype), np.empty(LANES, W.dtype)
    e0, e1, e2, e3 = errors[0], errors[1], errors[2], errors[3]
    for begin in range(0, count, LANES):
        lanes = min(LANES, count - begin)
        s[:lanes], z[:lanes], sums[:] = scales[begin : begin + lanes], zeros[begin : begin + lanes], 0
        for lane in range(LANES):
            row = W[min(begin + lane, count - 1) // candidates]
            for j in range(columns):
                w[j, lane] = row[j]
        for start in range(0, columns, STRIP):
            _strip(w, U, s, z, low, high, start, errors, sums)
            for j in range(start + STRIP, columns):
                u0, u1, u2, u3 = U[start, j], U[start + 1, j], U[start + 2, j], U[start + 3, j]
                ahead = w[j]
                for c in range(LANES):
                    ahead[c] = (((ahead[c] - u0 * e0[c]) - u1 * e1[c]) - u2 * e2[c]) - u3 * e3[c]
        totals[begin : begin + lanes] = sums[:lanes]


class NumbaKernel:
    """See select.py; rows are split over as many threads as torch uses."""

    def quantize(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> tuple[Tensor, Tensor]:
        """See select.py."""
        values, errors = torch.empty(weight.shape), torch.empty(weight.shape)
        inputs = (weight, U, grid.scale[:, 0], grid.zeros[:, 0])
        _by_rows(_walk, inputs, format, (values, errors))
        return values.to(format.storage), errors

    def loss(self, weight: Tensor, U: Tensor, grid: Grid, format: NumberFormat) -> Tensor:
        """See select.py."""
        total = torch.zeros(len(weight), len(grid.scale))
        _by_rows(_loss, (weight, U, grid.scale.T, grid.zeros.T), format, (total,))
        return total.T


def _by_rows(
    kernel: Callable[..., None],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    format: NumberFormat,
    outputs: tuple[Tensor, ...],
) -> None:
    assert isinstance(format, IntFormat)
    W, U, scale, zero = (tensor.contiguous().numpy() for tensor in inputs)
    low, high, arrays = np.float32(format.lowest), np.float32(format.highest), [tensor.numpy() for tensor in outputs]
    threads = max(1, min(torch.get_num_threads(), len(W) // LEAST))
    bounds = [len(W) * part // threads for part in range(threads + 1)]

    def work(start: int, end: int) -> None:
        part = slice(start, end)
        kernel(W[part], U, scale[part], zero[part], low, high, *(array[part] for array in arrays))

    if threads == 1:
        work(0, len(W))
        return
    for done in [_pool(os.getpid()).submit(work, *bound) for bound in pairwise(bounds)]:
        done.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process; a forked process cannot use its parent's."""
    return ThreadPoolExecutor(os.cpu_count())
