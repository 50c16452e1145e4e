"""Which samples of a task are calibrated on, and the batches they come in."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator

import torch

from epmq_cli.data.samples import Samples
from epmq_cli.errors import DataError
from epmq_cli.families.family import Batch, Collate
from epmq_cli.suites import Task

log = logging.getLogger("epmq")


def draw(task: Task, count: int, seed: int) -> Samples:
    """`count` training samples in random order that depends on the seed and the task's name alone; all where there
    are fewer."""
    samples = task.data.load("train", count, zlib.crc32(f"{seed} {task.name}".encode()))
    if len(samples) == 0:
        raise DataError(f"task {task.name} has no training samples to calibrate on")
    if len(samples) < count:
        log.warning(
            "task %s: calibrating on all %d training samples, %d were asked for", task.name, len(samples), count
        )
    return samples


def batches(samples: Samples, collate: Collate, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Batches of inputs in order, on the device."""
    for start in range(0, len(samples), batch_size):
        batch = collate([samples.inputs[i] for i in range(start, min(start + batch_size, len(samples)))])
        yield {name: tensor.to(device) for name, tensor in batch.items()}
