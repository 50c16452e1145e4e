"""Which samples of a task are calibrated on, and the batches they come in."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.documents import token_blocks
from epmq_cli.data.samples import Samples, Split
from epmq_cli.data.suite import Task
from epmq_cli.errors import DataError

log = logging.getLogger("epmq")


def draw(task: Task, count: int, seed: int) -> Samples:
    """`count` training samples in random order that depends on the seed and the task's name alone; all where there
    are fewer."""
    samples = task.data.load("train", count, task_seed(seed, task.name))
    if len(samples) == 0:
        raise DataError(f"task {task.name} has no training samples to calibrate on")
    if len(samples) < count:
        log.warning(
            "task %s: calibrating on all %d training samples, as there are fewer than calib.samples=%d",
            task.name,
            len(samples),
            count,
        )
    return samples


def task_seed(seed: int, task: str, split: Split = "train") -> int:
    """The seed of one task's samples of a split: torch's generator uses 32 bits of it."""
    return zlib.crc32(f"{seed} {task}{' test' if split == 'test' else ''}".encode())


def sequences(task: Task, tokens_of: Callable[[Sequence[Any]], Tensor], count: int, seed: int) -> Samples:
    """`count` sequences of the task's `max_length` tokens, cut out of the tokens of its training documents; of these at
    most `documents` are read. `tokens_of`: the tokens (tokens,) of some documents."""
    documents = task.data.load("train", task.documents, task_seed(seed, task.name)).inputs
    blocks = token_blocks(tokens_of(documents), task.max_length, count, task_seed(seed, task.name))
    return Samples(list(blocks))


def batches(
    samples: Samples, collate: Collate, batch_size: int, device: torch.device, starts: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Batches of inputs in order, on the device: all, or those that begin at these samples."""
    for start in range(0, len(samples), batch_size) if starts is None else starts:
        batch = collate([samples.inputs[i] for i in range(start, min(start + batch_size, len(samples)))])
        yield {name: tensor.to(device) for name, tensor in batch.items()}
