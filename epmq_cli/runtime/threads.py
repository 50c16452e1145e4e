"""Work on pieces of tensors, spread over threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 16  # with more threads, memory bandwidth is the limit


def threads() -> int:
    """The number of threads: as many as torch uses, at most `MOST`."""
    return min(torch.get_num_threads(), MOST)


def spread(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The result of `work` for each item, in their order. `work` must not call this function.

    Within each of them torch uses a single thread, which is fastest for small pieces. The threads inherit the caller's
    inference mode, because inference tensors can only be written in it.
    """
    items, inference = list(items), torch.is_inference_mode_enabled()
    if threads() == 1 or len(items) < 2:
        return [work(item) for item in items]

    def call(item: Item) -> Result:
        with torch.inference_mode(inference):
            return work(item)

    return list(_pool(os.getpid(), threads()).map(call, items))


@cache
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """The threads of a process. A child process inherits none, so it makes its own."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
