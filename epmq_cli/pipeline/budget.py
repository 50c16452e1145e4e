"""`budget=310MB`: the sizes of checkpoints, known from shapes before anything is calibrated, and its checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from epmq_cli.checkpoint.engines import loaded_formats
from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.checkpoint.write import dense_entries
from epmq_cli.config.instantiate import option_name
from epmq_cli.config.schema import bytes_of
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family, linear_groups, linear_shapes
from epmq_cli.quantize.formats.format import Grid, NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.names import labels
from epmq_cli.quantize.mixed_precision import MixedPrecision, Sizes
from epmq_cli.quantize.quantizer import Quantizer
from epmq_cli.runtime import distributed
from epmq_cli.runtime.console import say
from epmq_cli.store.safetensors_writer import FILE_BYTES, most_bytes

if TYPE_CHECKING:
    from torch import nn

    from epmq_cli.pipeline.job import Job

DIGITS = 12
"""The digits of offsets in files of any size."""
META = "meta"


def loadable(quantizer: Quantizer | MixedPrecision, exporter: Exporter, family: Family) -> Quantizer | MixedPrecision:
    """The quantizer; under a budget only with the formats that the engines of `pack` load, if they load any.
    ConfigError if the exporter stores weights dense, so that all have the same size."""
    if not isinstance(quantizer, MixedPrecision) or quantizer.budget is None:
        return quantizer
    if not exporter.packs:
        pack = option_name("pack", type(exporter))
        raise ConfigError(
            f"budget limits the size of packed weights, got pack={pack}, which stores them dense; use "
            "pack=compressed_tensors"
        )
    loaded = loaded_formats(exporter, family, quantizer.formats)
    kept = tuple(one for one in quantizer.quantizers if one.format in loaded)
    return replace(quantizer, quantizers=kept or quantizer.quantizers)


def sizes_of(mixed: MixedPrecision, job: Job, model: nn.Module, dtype: torch.dtype) -> Sizes:
    """The sizes of the checkpoint of a model in the formats of a mix. `dtype`: of scales and dense tensors."""
    shapes, digits = dict(linear_shapes(model, job.family)), DIGITS if mixed.budget is None else len(str(mixed.budget))
    rest = sum(most_bytes(entry, digits) for entry in dense_entries(model, shapes, dtype))
    groups: dict[str, list[int]] = {}
    for name, group in linear_groups(model, job.family).items():
        known = groups.setdefault(group, [0] * len(mixed.formats))
        for index, format in enumerate(mixed.formats):
            entries = job.exporter.entries(name, _weight(shapes[name], format, dtype))
            known[index] += sum(most_bytes(entry, digits) for entry in entries)
    total = rest + sum(map(max, groups.values()))
    files = 1 + 2 * total // bytes_of("pack.shard_size", job.exporter.shard_size)
    return Sizes(rest + FILE_BYTES * files, {group: tuple(sums) for group, sums in groups.items()})


def _weight(shape: Sequence[int], format: NumberFormat, dtype: torch.dtype) -> QuantizedWeight:
    """A weight (out, in) without values."""
    outputs, inputs = shape
    codes = torch.empty(outputs, inputs, dtype=format.storage, device=META)
    scale = torch.empty(outputs, -(-inputs // group_columns(format, inputs)), device=META)
    return QuantizedWeight(codes, Grid(scale, None), format, dtype)


def with_sizes(job: Job, model: nn.Module, dtype: torch.dtype) -> Quantizer | MixedPrecision:
    """The job's quantizer; a mix with the sizes of the model's checkpoint."""
    mixed = job.quantizer
    return replace(mixed, sizes=sizes_of(mixed, job, model, dtype)) if isinstance(mixed, MixedPrecision) else mixed


def check_budget(job: Job, model: nn.Module, dtype: torch.dtype) -> None:
    """ConfigError if no mix fits the budget. Says if the largest one fits."""
    mixed = job.quantizer
    if not isinstance(mixed, MixedPrecision) or mixed.budget is None:
        return
    sizes, budget = sizes_of(mixed, job, model, dtype), _option(mixed.budget)
    low, *_, high = labels(mixed.formats)
    span = f"{_option(sizes.smallest)} (all linears {low}) to {_option(sizes.largest)} (all {high})"
    if mixed.budget < sizes.smallest:
        raise ConfigError(
            f"budget={budget} is too small: the weight files of this model take {span}; give a larger budget or "
            "group_size"
        )
    if mixed.budget > sizes.largest and distributed.is_main():
        say(f"budget={budget} limits nothing: the weight files of this model take {span}")


def _option(count: int) -> str:
    """Bytes as the option takes them, rounded up."""
    return f"{math.ceil(count / 10**3)}KB" if count < 10**7 else f"{math.ceil(count / 10**5) / 10:.1f}MB"
