"""Changed copies of calibration samples. An expert's outputs for them tell as much as those for the samples, so a few
samples go a longer way in training (consistent teaching, Beyer et al. 2022, https://arxiv.org/abs/2106.05237)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from epmq_cli.data.batching import Batch

if TYPE_CHECKING:
    from torch import Tensor

SHIFT = 0.1  # of the height and width of pictures
REPLACED = 0.1  # share of tokens


def view(batch: Batch, seed: int, number: int) -> Batch:
    """A changed copy of a batch; number 0 is the batch itself.

    Pictures are shifted by up to a tenth, reflected at the edges. Of texts, one token in ten becomes another of the
    batch; the first and last token of a text and those that all texts have in common stay. The changes depend on the
    contents of the batch, the seed and the number alone.
    """
    if number == 0:
        return batch
    key = hashlib.sha256(f"{seed} {number}".encode())
    for name in ("pixel_values", "input_ids"):
        if name in batch:
            key.update(batch[name].cpu().numpy().tobytes())
    generator = torch.Generator().manual_seed(int.from_bytes(key.digest()[:8], "little") >> 1)
    changed = dict(batch)
    if "pixel_values" in batch:
        changed["pixel_values"] = shifted(batch["pixel_values"], generator)
    if "input_ids" in batch:
        mask = batch.get("attention_mask")
        real = torch.ones_like(batch["input_ids"]) if mask is None else mask
        changed["input_ids"] = replaced(batch["input_ids"], real.bool(), generator)
    return changed


def with_views(batch: Batch, seed: int, views: int) -> Batch:
    """A batch and its views, one after the other: `views` times as many samples."""
    if views == 1:
        return batch
    every = [view(batch, seed, number) for number in range(views)]
    return {name: torch.cat([each[name] for each in every]) for name in batch}


def shifted(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (samples, channels, height, width), each shifted by up to `SHIFT` in both directions."""
    samples, channels, *sizes = pictures.shape
    index = []
    for size in sizes:
        most = max(1, round(SHIFT * size))
        places = torch.arange(size) + torch.randint(-most, most + 1, (samples, 1), generator=generator)
        index.append((size - 1 - (size - 1 - places.abs()).abs()).to(pictures.device))  # reflected at both ends
    rows, columns = index
    sample = torch.arange(samples, device=pictures.device)[:, None, None, None]
    channel = torch.arange(channels, device=pictures.device)[None, :, None, None]
    return pictures[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def replaced(tokens: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """Token ids (samples, tokens), about `REPLACED` of them replaced by others of the batch. `real`: which are not
    padding."""
    number = real.cumsum(1)
    free = real & (number > 1) & (number < number[:, -1:])
    common = set(tokens[0][real[0]].tolist())
    for row, mask in zip(tokens, real, strict=True):
        common &= set(row[mask].tolist())
    if len(tokens) > 1:
        free &= ~torch.isin(tokens, torch.tensor(sorted(common), dtype=tokens.dtype, device=tokens.device))
    pool = tokens[free]
    chosen = free & (torch.rand(tokens.shape, generator=generator) < REPLACED).to(tokens.device)
    if not chosen.any():
        return tokens
    drawn = torch.randint(len(pool), (int(chosen.sum()),), generator=generator).to(tokens.device)
    changed = tokens.clone()
    changed[chosen] = pool[drawn]
    return changed
