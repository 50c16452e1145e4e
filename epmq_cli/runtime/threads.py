"""Work on the pieces of tensors, shared out among threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 16  # beyond it memory is what such work waits for


def threads() -> int:
    """How many work at a time: as many as torch has, up to `MOST`."""
    return min(torch.get_num_threads(), MOST)


def spread(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `work`, which must not call this function again, makes of each item, in their order.

    In each thread torch works alone: several threads for one small piece would cost more than they bring.
    Inference mode there is what it is here, or tensors made here could not be written there.
    """
    items, inference = list(items), torch.is_inference_mode_enabled()
    if threads() == 1 or len(items) < 2:
        return [work(item) for item in items]

    def alike(item: Item) -> Result:
        with torch.inference_mode(inference):
            return work(item)

    return list(_pool(os.getpid(), threads()).map(alike, items))


@cache
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """The threads of a process: its children have none of them."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
