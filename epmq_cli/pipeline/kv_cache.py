"""Measures what a decoder caches, for `quant.kv_cache`."""

from __future__ import annotations

import torch
from torch import nn

from epmq_cli.calibrate.activations.batch_invariant import batch_invariant
from epmq_cli.calibrate.cache_ranges import Ranges, cache_ranges
from epmq_cli.checkpoint.calibrated_scales import cache_scales
from epmq_cli.data.batching import Batches, split
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import Job


@torch.inference_mode()
def measured_cache(context: RunContext, model: nn.Module, batches: Batches) -> dict[str, float]:
    """The scales of the keys and values that the model caches on the calibration batches, by the names of their
    tensors; empty without `quant.kv_cache`."""
    if context.job.kv_cache is None:
        return {}
    every = [batch for group in batches.values() for batch in group]

    def measured(samples: int) -> Ranges:
        with batch_invariant(model):
            return cache_ranges(model, context.job.family, every, samples)

    return cache_scales(context.micro.run(measured))


@torch.inference_mode()
def check_cache(job: Job, model: nn.Module, batches: Batches) -> None:
    """ModelError if the cache of a model cannot be measured, with `quant.kv_cache`."""
    if job.kv_cache is not None:
        first = next(iter(batches.values()))[0]
        cache_ranges(model, job.family, [next(iter(split(first, 1)))], 1)
