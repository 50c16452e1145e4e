"""Perplexity of a language model on running text (https://huggingface.co/docs/transformers/perplexity)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import DataError, ModelError
from epmq_cli.evaluate.metrics import Score
from epmq_cli.evaluate.standard_errors import perplexity_error

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 700.0  # mean loss: the exponential of more overflows
PLACES = 1 << 26  # logits turned into losses at a time: 0.25 GB in float32

Window = tuple[int, int, int]
"""Start and end of a window, and the number of its last tokens that no earlier window contains."""


def perplexity(
    losses_of: Callable[[Tensor], Tensor],
    ids: Tensor,
    length: int,
    stride: int,
    batch_size: int,
) -> Score:
    """exp of the mean loss of the predicted tokens of `ids` (tokens,), read in windows of `length` tokens. Of `ids`
    (tokens, 2) only those with a 1 beside them count, and models read all.

    `losses_of` returns `window_losses` for windows (windows, tokens). Each window starts `stride` tokens after the one
    before it, and only its new tokens count. With `stride` equal to `length`, the protocol of GPTQ and most tables,
    windows do not overlap and the first token of each is not predicted; with a smaller stride each token except the
    first counts once. The last window may be shorter, and counts; GPTQ (https://github.com/IST-DASLab/gptq,
    `llama_eval`) drops it, which equals this on `ids` cut to whole windows.
    DataError if no token is predicted, ModelError if logits are NaN. The mean loss is capped at `LARGEST`. Samples of
    the score are windows with tokens that count.
    """
    ids, marks = ids.unbind(1) if ids.ndim == 2 else (ids, torch.ones_like(ids))
    sums, counts = [], []
    for group in batched(windows(len(ids), length, stride), batch_size):
        losses = losses_of(torch.stack([ids[start:end] for start, end, _ in group]))
        for (_, end, fresh), row in zip(group, losses, strict=True):
            new = min(fresh, len(row))
            counted = row[len(row) - new :][marks[end - new : end] == 1]
            if len(counted):
                sums.append(float(counted.sum()))
                counts.append(len(counted))
    if not counts and len(ids) > 1:
        raise DataError(
            f"perplexity needs answers behind the first token of windows of {length} tokens, got none among {len(ids)} "
            "tokens; raise max_length, or give more test data"
        )
    if not counts:
        raise DataError(f"perplexity needs at least two tokens of text, got {len(ids)}")
    total, count = sum(sums), sum(counts)
    if math.isnan(total):
        raise ModelError("the logits of the model contain NaN; check its weights")
    if total / count >= LARGEST:
        return Score(math.exp(LARGEST), None, len(counts))
    return Score(math.exp(total / count), perplexity_error(sums, counts), len(counts))


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """The windows over this number of tokens; the last one ends at the last token."""
    reached = 0
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        yield start, end, end - reached
        reached = end
        if end == tokens:
            return


def batched(spans: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Groups of at most `size` windows of one length."""
    group: list[Window] = []
    for window in spans:
        if group and (len(group) == size or window[1] - window[0] != group[0][1] - group[0][0]):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def window_losses(logits_of: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """The loss of each predicted token, (windows, tokens - 1) in float64 on the CPU, for windows `ids` (windows,
    tokens); `logits_of` returns (windows, tokens, vocabulary)."""
    logits, targets = logits_of(ids)[:, :-1], ids[:, 1:]
    rows = max(1, PLACES // max(1, logits[0].numel()))
    parts = [
        torch.nn.functional.cross_entropy(part.float().transpose(1, 2), target.to(part.device), reduction="none")
        .double()
        .cpu()
        for part, target in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat(parts)
