"""Measures what this machine computes and hashes in a second, in about a second.

Processor time counts on the CPU, divided by the threads, and the fastest of several calls, so that other programs
change the result little: estimates are those of an idle machine.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from epmq_cli.inspection.operations import Operations
from epmq_cli.inspection.work import Group
from epmq_cli.runtime.products import fast_products

LONGEST = 0.6  # seconds of one measurement
SHORTEST = 1e-3  # seconds of a round of calls, longer than the clock's steps
WIDEST = 1024  # of the Cholesky that is measured; a larger one takes longer by the cube
PRODUCT = 2 * 10**9
"""Operations of the product that is measured, at most: a long one is never undisturbed on a busy machine."""
ROWS = 64  # at least


@dataclass(frozen=True)
class Throughput:
    """`single` and `double`: operations a second of a matrix product in float32 and of a Cholesky in float64. `call`:
    seconds of a call of torch on a small tensor. `bytes`: bytes a second of sha256, which reads and writes wait for.
    `rows`: of the product."""

    single: float
    double: float
    call: float
    bytes: float
    rows: int = 0

    def seconds(self, operations: Operations) -> float:
        """The seconds of these operations, one after the other."""
        return (
            operations.single / self.single
            + operations.double / self.double
            + operations.calls * self.call
            + operations.bytes / self.bytes
            + operations.seconds
        )


def measured_throughput(widest: Group, rows: int, device: torch.device) -> Throughput:
    """The throughput for products of `rows` tokens with the widest linears, and for a Cholesky of their inputs."""
    rows = max(1, min(rows, max(ROWS, PRODUCT // (2 * widest.width * widest.outs))))
    a, b = torch.randn(rows, widest.width, device=device), torch.randn(widest.width, widest.outs, device=device)
    width = min(widest.width, WIDEST)
    root = torch.randn(width, width, dtype=torch.float64, device=device)
    square = root @ root.T + width * torch.eye(width, dtype=torch.float64, device=device)
    small = torch.randn(8, 8, device=device)
    piece = bytes(1 << 22)
    threads = torch.get_num_threads()
    with fast_products():
        product = _seconds(lambda: a @ b, device, threads)
    return Throughput(
        single=2 * rows * widest.width * widest.outs / product,
        double=width**3 / 3 / _seconds(lambda: torch.linalg.cholesky(square), device, threads),
        call=_seconds(lambda: small + small, device),
        rows=rows,
        bytes=len(piece) / _seconds(lambda: hashlib.sha256(piece).digest(), torch.device("cpu")),
    )


def _seconds(call: Callable[[], object], device: torch.device, threads: int = 1) -> float:
    """The seconds of a call in the fastest round of calls that begin within `LONGEST` seconds; the first call does not
    count."""
    _round(call, 1, device)
    count = max(1, round(SHORTEST / max(_round(call, 1, device), 1e-7)))
    start, fastest = time.perf_counter(), float("inf")
    while fastest == float("inf") or time.perf_counter() - start < LONGEST:
        fastest = min(fastest, _round(call, count, device) / count)
    return fastest / (threads if device.type == "cpu" else 1)


def _round(call: Callable[[], object], count: int, device: torch.device) -> float:
    """The seconds of some calls: of the processor, or by the clock on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    start = clock()
    for _ in range(count):
        call()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
