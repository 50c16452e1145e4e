"""Estimates disk and time of a run from the sizes of its models and samples, and puts all estimates together."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from epmq_cli.checkpoint.gguf.size import header_bytes, tensor_bytes
from epmq_cli.config.schema import bytes_of
from epmq_cli.families.family import linear_shapes
from epmq_cli.inspection.memory import activation_bytes, memory_content
from epmq_cli.inspection.planned import Planned
from epmq_cli.inspection.throughput import measured_throughput
from epmq_cli.inspection.work import Work, sequential, work_of
from epmq_cli.pipeline.budget import sizes_of
from epmq_cli.pipeline.job import Job
from epmq_cli.quantize.formats.format import NumberFormat, group_columns
from epmq_cli.quantize.mixed_precision import MixedPrecision, formats_of
from epmq_cli.runtime.products import exact_products


def estimates(plan: Planned, job: Job, model: nn.Module) -> dict[str, Any]:
    """Memory and disk in bytes, time in seconds by stage, and how they are estimated."""
    spent = time.process_time()  # imports, and the models and samples that the plan has read as the run will
    _import_kernels(job)
    work = work_of(plan, job, model)
    rows = work.tokens // max(work.batches, 1)
    exact_products(job.device)
    speed = measured_throughput(work.widest, rows, job.device)
    seconds = {name: speed.seconds(operations) for name, operations in work.stages.items()}
    seconds["read"] += spent
    budget = budget_content(job, model, plan.dtype)
    disk = disk_content(plan, job, work)
    if budget:
        disk["checkpoint"] = min(budget["bytes"], budget["largest"])
    if job.exporter.gguf is not None and not plan.refused:
        disk["model.gguf"] = gguf_bytes(plan, job, model, budget)
    return {
        "memory": memory_content(plan, job, model, work),
        "disk": disk,
        **({"budget": budget} if budget else {}),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 3),
        "measured": {
            "product_gflops": round(speed.single / 1e9, 2),
            "cholesky_gflops": round(speed.double / 1e9, 2),
            "call_microseconds": round(speed.call * 1e6, 2),
            "hashed_megabytes": round(speed.bytes / 1e6, 1),
            "product": [speed.rows, work.widest.width, work.widest.outs],
        },
        "calibration_tokens": work.tokens,
        "test_tokens": work.tests,
    }


def budget_content(job: Job, model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """The budget, and the smallest and largest size of the weight files that it could buy; empty without a budget."""
    mixed = job.quantizer
    if not isinstance(mixed, MixedPrecision) or mixed.budget is None:
        return {}
    sizes = sizes_of(mixed, job, model, dtype)
    return {"bytes": mixed.budget, "smallest": sizes.smallest, "largest": sizes.largest}


def _import_kernels(job: Job) -> None:
    """Imports the compiler of the kernels, which takes memory."""
    if job.device.type == "cpu":
        importlib.import_module("epmq_cli.quantize.kernels.numba")


def disk_content(plan: Planned, job: Job, work: Work) -> dict[str, int]:
    """Bytes of the checkpoint, of what the run folder holds beside it until the run ends, and of the cache."""
    dense = plan.dtype.itemsize
    rest = dense * (work.parameters - work.quantized)
    linears = dense * work.quantized
    if sequential(job) and job.exporter.packs:
        linears = int(sum(_bits(job, group.width, dense) * group.width * group.outs for group in work.groups) / 8)
    overflow = 0
    if job.guidance.needs_inputs:
        overflow = max(0, activation_bytes(job, work) - bytes_of("calib.memory", job.calib.memory))
    student = 4 * work.parameters if job.calib.student == "disk" else 0
    stored = sum(info.size for folder in plan.experts.values() for info in folder.infos.values())
    count = max(len(plan.experts), 1)
    return {
        "checkpoint": rest + linears,
        "resume": 2 * work.quantized + overflow + student,
        "cache": stored // count,
    }


def gguf_bytes(plan: Planned, job: Job, model: nn.Module, budget: Mapping[str, int]) -> int:
    """The bytes of model.gguf. Of a mix between those of its first and last format in all linears; without the tokens
    of models that are not on this machine. `budget`: see `budget_content`."""
    assert plan.base is not None and job.exporter.gguf is not None
    config, linears = plan.base.config, dict(linear_shapes(model, job.family)) if sequential(job) else {}
    formats = formats_of(job.quantizer) or (None,)
    low, high = (
        tensor_bytes(model, config, linears, format, job.exporter.gguf) for format in (formats[0], formats[-1])
    )
    share = 0.0
    if budget:
        span = budget["largest"] - budget["smallest"]
        share = (min(budget["bytes"], budget["largest"]) - budget["smallest"]) / span if span else 0.0
    elif isinstance(job.quantizer, MixedPrecision):
        share = _share(job.quantizer)
    tokens = header_bytes(model, config, plan.base.path) if plan.base.path.is_dir() else 0
    return tokens + int(low + max(share, 0.0) * (high - low))


def _share(mixed: MixedPrecision) -> float:
    """The share of the weights that have the last format of two."""
    low, *_, high = mixed.formats
    return 0.0 if mixed.bits is None else (mixed.bits - low.bits) / (high.bits - low.bits)


def _bits(job: Job, width: int, dense: int) -> float:
    """The bits of a weight with its share of scales and zero points."""
    formats = formats_of(job.quantizer)
    low = formats[0]
    own = _with_scales(low, width, dense)
    if not isinstance(job.quantizer, MixedPrecision) or job.quantizer.bits is None:
        return own
    return own + _share(job.quantizer) * (_with_scales(formats[-1], width, dense) - own)


def _with_scales(format: NumberFormat, width: int, dense: int) -> float:
    zero, sharing = format.bits if format.zero_points != "none" else 0, group_columns(format, width) * format.row_block
    return float(format.bits + ((format.scale_bits or 8 * dense) + zero) / sharing)
