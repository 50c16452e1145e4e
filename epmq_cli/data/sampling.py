"""Draws the calibration samples of a task and puts them into batches."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.documents import token_blocks
from epmq_cli.data.mixture import Mixture
from epmq_cli.data.samples import Samples, Source, Split
from epmq_cli.data.suite import TEXT_METRICS, Task
from epmq_cli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

SHORTEST = 2  # tokens of a document that calibration uses

log = logging.getLogger("epmq")


def draw(task: Task, count: int, seed: int) -> Samples:
    """`count` training samples in a random order that depends on the seed and the task's name alone; all if there are
    fewer."""
    samples = task.data.load("train", count, task_seed(seed, task.name))
    check_some(task.name, "train", len(samples))
    if len(samples) < count:
        log.warning(
            "task %s: calibration uses all %d training samples, fewer than calib.samples=%d",
            task.name,
            len(samples),
            count,
        )
    return samples


def check_some(task: str, split: Split, count: int) -> None:
    """Raises DataError if a split has no samples."""
    if count == 0:
        use = "training samples to calibrate on" if split == "train" else "test samples to score on"
        raise DataError(f"task {task} has no {use}")


def scored_source(task: Task) -> Source:
    """The source of a task's test samples, without labels for metrics that need none."""
    data: Any = task.data
    if task.metric in ("perplexity", *TEXT_METRICS) and getattr(data, "label", None) is not None and is_dataclass(data):
        data = replace(data, label=None)  # type: ignore[type-var]
    return data  # type: ignore[no-any-return]


def task_seed(seed: int, task: str, split: Split = "train") -> int:
    """The seed of a split of one task; torch's generator uses 32 bits of it."""
    return zlib.crc32(f"{seed} {task}{' test' if split == 'test' else ''}".encode())


def sequences(task: Task, tokens_of: Callable[[Sequence[Any]], list[Tensor]], count: int, seed: int) -> Samples:
    """`count` sequences of tokens. With `task.packing`, each has the task's `max_length` tokens, cut out of at most
    `task.documents` training documents; otherwise each is a document, cut at that length, and short ones come first.

    `tokens_of` returns the tokens (tokens,) of documents: of all that are joined, or of each.
    """
    own = task_seed(seed, task.name)
    if not task.packing:
        cut = [ids[: task.max_length] for ids in tokens_of(draw(task, count, seed).inputs)]
        return Samples(sorted((ids for ids in cut if len(ids) >= SHORTEST), key=len))
    blocks: list[Tensor] = []
    for source, share in parts_of(task.data, count):
        documents = source.load("train", task.documents, own).inputs
        blocks += token_blocks(torch.cat(tokens_of(documents)), task.max_length, share, own)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(own)).tolist()
    return Samples([blocks[place] for place in order] if isinstance(task.data, Mixture) else blocks)


def parts_of(data: Source, count: int) -> list[tuple[Source, int]]:
    """The sources that give `count` samples, with the number of each."""
    if not isinstance(data, Mixture):
        return [(data, count)]
    shares = zip(data.sources, data.shares(count), strict=True)
    return [(source, share) for source, share in shares if share]


def batches(
    samples: Samples, collate: Collate, batch_size: int, device: torch.device, starts: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Batches of inputs in order, on the device: all of them, or those that begin at the samples `starts`."""
    for start in range(0, len(samples), batch_size) if starts is None else starts:
        batch = collate([samples.inputs[i] for i in range(start, min(start + batch_size, len(samples)))])
        yield {name: tensor.to(device) for name, tensor in batch.items()}
