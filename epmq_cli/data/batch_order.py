"""The order in which training takes batches: the same for any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import count

import numpy as np

from epmq_cli.runtime import distributed


def shuffled(count: int, seed: int, task: str, epoch: int) -> list[int]:
    """The numbers below `count` in a random order, which depends on the seed, the task and the epoch alone."""
    key = hashlib.sha256(f"{seed}\n{task}\n{epoch}".encode()).digest()
    order = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).permutation(count)
    numbers: list[int] = order.tolist()
    return numbers


def own_numbers(parts: Sequence[int]) -> list[int | None]:
    """For the parts of the batches of all processes, in the order of one process: the number of each among this
    process's parts, None for those of others. `parts`: of each of this process's batches. Processes take turns with
    batches."""
    everyone, number = distributed.all_gather(parts), count()
    numbers: list[int | None] = []
    for turn in range(max(map(len, everyone))):
        for rank, counts in enumerate(everyone):
            for _ in range(counts[turn] if turn < len(counts) else 0):
                numbers.append(next(number) if rank == distributed.rank() else None)
    return numbers
