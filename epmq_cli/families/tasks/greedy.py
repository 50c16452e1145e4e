"""Answers of decoders to prompts of different lengths: the most likely token each time."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.batching import Batch
from epmq_cli.models.attention import cache_argument

if TYPE_CHECKING:
    from torch import Tensor, nn

MASK, POSITIONS = "attention_mask", "position_ids"


def left_padded(prompts: Sequence[Tensor]) -> Batch:
    """A batch of prompts (tokens,) with their mask. Padding comes first, so that all answers begin at one place."""
    masks = [torch.ones_like(ids) for ids in prompts]
    parts = {"input_ids": prompts, MASK: masks}
    return {
        name: torch.nn.utils.rnn.pad_sequence([*each], batch_first=True, padding_side="left")
        for name, each in parts.items()
    }


def greedy_answers(model: nn.Module, batch: Batch, length: int, ends: Collection[int]) -> Tensor:
    """The answers (samples, length) of a model to a batch of `left_padded`, each filled from its end on with its end
    token, one of `ends`."""
    fed, mask, cache = batch["input_ids"], batch[MASK], None
    name = str(cache_argument(model))
    positioned = POSITIONS in inspect.signature(model.forward).parameters
    stop = torch.tensor(sorted(ends), dtype=fed.dtype, device=fed.device)
    answers: list[Tensor] = []
    for _ in range(length):
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        options: dict[str, Any] = {POSITIONS: places} if positioned else {}
        output = model(input_ids=fed, use_cache=True, **{MASK: mask, name: cache}, **options)
        cache, best = getattr(output, name), output.logits[:, -1].argmax(-1)
        if answers:
            best = torch.where(torch.isin(answers[-1], stop), answers[-1], best)
        answers.append(best)
        if torch.isin(best, stop).all():
            break
        fed = best[:, None]
        mask = torch.cat([mask, torch.ones_like(fed)], 1)
    answers += [answers[-1]] * (length - len(answers))
    return torch.stack(answers, 1)
