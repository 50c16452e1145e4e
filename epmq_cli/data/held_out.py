"""Every fifth calibration sample of a task is held out, to judge what is fitted on the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from epmq_cli.data.batching import Batch, Batches, size
from epmq_cli.errors import DataError
from epmq_cli.runtime import distributed

if TYPE_CHECKING:
    from torch import Tensor

HOLD = 5  # every fifth sample is held out
Subset = Literal["all", "fitted", "held"]
"""The samples of a task that count: all, those that are not held out, or those that are."""


def members(subset: Subset, sizes: Sequence[int]) -> list[Tensor | None]:
    """Which samples (samples,) of each of this process's batches of a task are in a subset; None for all.

    `sizes`: of the batches. Samples have the same numbers for any number of processes, which take turns with batches.
    """
    if subset == "all":
        return [None] * len(sizes)
    most, processes = distributed.broadcast(sizes[0]), distributed.world_size()
    starts = [most * (processes * index + distributed.rank()) for index in range(len(sizes))]
    held = [(start + torch.arange(own)) % HOLD == HOLD - 1 for start, own in zip(starts, sizes, strict=True)]
    return [*held] if subset == "held" else [~own for own in held]


def hold_out(batches: Batches) -> tuple[Batches, Batches]:
    """The samples of this process's batches that are not held out, and those that are. A part may be empty, and has the
    place of its batch all the same."""
    fitted, held = dict[str, list[Batch]](), dict[str, list[Batch]]()
    for task, group in batches.items():
        masks = members("held", [size(batch) for batch in group])
        fitted[task] = [{name: x[~mask] for name, x in batch.items()} for batch, mask in zip(group, masks, strict=True)]  # type: ignore[operator]
        held[task] = [{name: x[mask] for name, x in batch.items()} for batch, mask in zip(group, masks, strict=True)]
    return fitted, held


def filled(batches: Batches) -> Batches:
    """The batches that are not empty."""
    return {task: [batch for batch in group if size(batch)] for task, group in batches.items()}


def check_enough(task: str, batches: Sequence[Batch], option: str) -> None:
    """DataError if no sample of a task would be held out. `option`: what holds samples out, as the user sets it."""
    count = sum(distributed.all_gather(sum(map(size, batches))))
    if count < HOLD:
        raise DataError(
            f"task {task} has {count} calibration samples, but {option} needs {HOLD}, because one in {HOLD} is held "
            "out; raise calib.samples, or leave this option out"
        )
