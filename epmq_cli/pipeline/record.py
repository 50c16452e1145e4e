"""The record and model card of a run's checkpoint, and the metrics of the walk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from epmq_cli import __version__
from epmq_cli.calibrate.progress import WalkResult
from epmq_cli.checkpoint.card_metadata import license_of
from epmq_cli.checkpoint.engine import Base
from epmq_cli.checkpoint.model_card import ModelCard, loading_code
from epmq_cli.checkpoint.write import Contents, linear_bytes, untied, weight_bytes
from epmq_cli.evaluate.score import ScoredTask
from epmq_cli.pipeline.task_processors import PROCESSORS, Processors, place
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight
from epmq_cli.quantize.mixed_precision import formats_of

if TYPE_CHECKING:
    from epmq_cli.pipeline.job import Job

RECORDED = ("suite", "merge", "guidance", "refine", "calib", "quant", "pack", "bits", "budget", "group_size", "seed")


def average_bits(walk: WalkResult) -> float | None:
    """The mean bit width over all quantized weights; None if no weight is quantized."""
    weights = [weight for weight in walk.weights.values() if isinstance(weight, QuantizedWeight)]
    count = sum(weight.codes.numel() for weight in weights)
    return sum(weight.format.bits * weight.codes.numel() for weight in weights) / count if count else None


def record_text(
    job: Job, resolved: Any, choices: Mapping[str, str], tasks: Sequence[ScoredTask], processors: Processors
) -> str:
    """The record. `epmq eval` reads the tasks, their classes and their `processors` from it.

    It does not contain the time or the run's folder, so equal runs write equal bytes.
    """
    record = {
        "epmq": __version__,
        "choices": dict(choices),
        "config": {key: resolved[key] for key in RECORDED if key != "budget" or resolved[key] is not None},
        "classes": {task.name: task.names for task in tasks},
    }
    if processors:
        record[PROCESSORS] = list(processors)
    return json.dumps(record, indent=2) + "\n"


def card(
    job: Job,
    inputs: tuple[nn.Module, Path],
    choices: Mapping[str, str],
    overrides: Sequence[str],
    walk: WalkResult,
    processors: Processors,
) -> ModelCard:
    """The model card. `inputs`: the student and the folder of the base."""
    model, base = inputs
    bits, formats = average_bits(walk), _formats(job, walk)
    config = Base(model.config.to_dict(), base)  # type: ignore[operator, union-attr]
    code = loading_code(job.family, model, job.suite, formats if bits is not None else (), job.exporter, config)
    return ModelCard(
        suite=job.suite,
        pipeline=job.family.tasks.pipeline,
        choices=choices,
        formats=formats,
        bits=bits,
        exporter=job.exporter,
        loading=code,
        license=license_of(base),
        processors={task: place(task) for task in processors},
        overrides=overrides,
    )


def _formats(job: Job, walk: WalkResult) -> Sequence[NumberFormat]:
    """The possible formats of a linear, and of a mix those that some linear has."""
    chosen = {(record.chosen, record.group_size) for record in walk.sensitivities}
    return [format for format in formats_of(job.quantizer) if not chosen or (format.name, format.group_size) in chosen]


def measured(walk: WalkResult) -> dict[str, Any]:
    """The entries of metrics.json about the walk."""
    layers = [asdict(record) for record in walk.records]
    blocks = {"blocks": [asdict(record) for record in walk.blocks]} if walk.blocks else {}
    mixed = {"sensitivity": [asdict(record) for record in walk.sensitivities]} if walk.sensitivities else {}
    return {"layers": layers, **blocks, **mixed, "average_bits": average_bits(walk), "events": events(walk)}


def events(walk: WalkResult) -> dict[str, int]:
    """Counts the calibrated linears, and those that needed more damping or a fallback, or that no token reached."""
    records, tokens = walk.records, [record.tokens for record in walk.records]
    return {
        "linears": len(records),
        "damping_retried": sum(record.damping_retries > 0 for record in records),
        "target_without_factor": sum(record.target_damping is None for record in records),
        "fallbacks": sum(record.fallback is not None for record in records),
        "unrouted": tokens.count(0) if any(tokens) else 0,  # without any, no inputs were measured
    }


def sizes(contents: Contents, checkpoint: Path) -> dict[str, int]:
    """The bytes of the whole model and of its calibrated linears, dense and as stored in the checkpoint."""
    size = contents.dtype.itemsize
    elements = {name: tensor.numel() for name, tensor in untied(contents.model).items()}
    return {
        "model_dense": size * sum(elements.values()),
        "model_packed": weight_bytes(checkpoint),
        "linears_dense": size * sum(elements[f"{name}.weight"] for name in contents.weights),
        "linears_packed": linear_bytes(contents),
    }
