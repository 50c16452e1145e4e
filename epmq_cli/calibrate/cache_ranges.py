"""The ranges of the keys and values that a decoder caches, on calibration batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from epmq_cli.data.batching import Batch, split
from epmq_cli.errors import ModelError
from epmq_cli.families.family import Family
from epmq_cli.models.attention import cached_attentions, recorded
from epmq_cli.runtime import distributed

if TYPE_CHECKING:
    from torch import nn

Ranges = dict[str, tuple[float, float]]
"""The largest magnitudes of the keys and of the values of each attention, by name."""


def cache_ranges(model: nn.Module, family: Family, batches: Sequence[Batch], samples: int) -> Ranges:
    """The ranges of the model as it is, over the batches of all processes.

    `samples`: how many samples run through the model at a time. ModelError if an attention caches nothing.
    """
    names, mask_of = cached_attentions(model), family.stacks(model)[0].mask
    with recorded(model, names) as recorders:
        for batch in batches:
            for part in split(batch, samples):
                for recorder in recorders.values():
                    recorder.mask = mask_of(part)
                family.features(model, part)
    seen = {name: recorder.seen for name, recorder in recorders.items()}
    if None in seen.values() or not names:
        silent = next((name for name, own in seen.items() if own is None), type(model).__name__)
        raise ModelError(f"{silent} caches no keys and values that epmq can measure; use quant.kv_cache=null")
    gathered = distributed.all_gather([seen[name] for name in names])
    return {
        name: (max(own[index][0] for own in gathered), max(own[index][1] for own in gathered))  # type: ignore[index]
        for index, name in enumerate(names)
    }
