"""Perplexity of a language model on running text (https://huggingface.co/docs/transformers/perplexity)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from epmq_cli.errors import DataError, ModelError

LARGEST = 700.0  # loss of a token: the exponential of more is no number that JSON has
PLACES = 1 << 26  # logits that are turned into losses at a time: 0.25 GB in float32

Window = tuple[int, int, int]
"""Where a window starts and ends, and how many of its last tokens no window before it had."""


def perplexity(
    losses_of: Callable[[Tensor], Tensor],
    ids: Tensor,
    length: int,
    stride: int,
    batch_size: int,
) -> float:
    """exp of the mean loss of the predicted tokens of `ids` (tokens,), read in windows of `length` tokens.

    `losses_of`: what `window_losses` gives of some windows (windows, tokens). A window starts `stride` tokens behind
    the one before it, and only what is new in it counts. With a stride of `length`, the protocol of GPTQ and most
    tables, windows do not overlap and the first token of each is not predicted; with a smaller one each token but the
    very first counts once. The last window may be shorter, and counts; GPTQ (https://github.com/IST-DASLab/gptq,
    `llama_eval`) drops it, whose number is that of `ids` cut to whole windows.
    DataError where nothing can be predicted, ModelError where logits are NaN; a loss is taken as at most `LARGEST`.
    """
    total, count = 0.0, 0
    for group in batched(windows(len(ids), length, stride), batch_size):
        losses = losses_of(torch.stack([ids[start:end] for start, end, _ in group]))
        for (_, _, fresh), row in zip(group, losses, strict=True):
            counted = row[-min(fresh, len(row)) :] if len(row) else row
            total, count = total + float(counted.sum()), count + len(counted)
    if count == 0:
        raise DataError(f"perplexity needs at least two tokens of text, got {len(ids)}")
    if math.isnan(total):
        raise ModelError("the logits of the model contain NaN; check its weights")
    return math.exp(min(total / count, LARGEST))


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """The windows over so many tokens, the last one up to their end."""
    reached = 0
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        yield start, end, end - reached
        reached = end
        if end == tokens:
            return


def batched(found: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Windows of one length, at most `size` at a time."""
    group: list[Window] = []
    for window in found:
        if group and (len(group) == size or window[1] - window[0] != group[0][1] - group[0][0]):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def window_losses(logits_of: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """The loss of each predicted token, (windows, tokens - 1) in float64 on the CPU, of windows (windows, tokens);
    `logits_of` them: (windows, tokens, vocabulary)."""
    logits, wanted = logits_of(ids)[:, :-1], ids[:, 1:]
    rows = max(1, PLACES // max(1, logits[0].numel()))
    parts = [
        cross_entropy(part.float().transpose(1, 2), target.to(part.device), reduction="none").double().cpu()
        for part, target in zip(torch.split(logits, rows), torch.split(wanted, rows), strict=True)
    ]
    return torch.cat(parts)
