"""Folds a transform's channel scales into a block before the block is measured or solved.

A layer's columns are multiplied by s, and the outputs of its producer (the norm or linear in front of it) divided by s.
Base, experts and merged model all get the same scales, so that each computes the same function as before, and all later
steps (moments, guidance, any quantizer) work in the scaled channels. A fold at the layer's own step would change a
producer that is already quantized, and forward passes that are paused behind it. The cost is a second measurement of
the inputs of foldable layers, with the merged weights of the block.

The experts' own forward passes stay as they are, because a fold changes no output; their
inputs to a folded layer are divided by s (`Student.read_scales`). So a resumed walk repeats their bits without the
scales of finished blocks. The
ridge lam ||Q - A||^2 acts on the scaled weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from epmq_cli.calibrate.activations.capture import CaptureSpec, LayerInputs
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.moments import Measure, task_weight
from epmq_cli.calibrate.norms import has_gain
from epmq_cli.calibrate.student import Student
from epmq_cli.families.structure import Linears, Section
from epmq_cli.quantize.quantizer import InputStatistics, Quantizer, Transform
from epmq_cli.runtime import distributed

TaskRows = Iterable[tuple[str, Iterator[LayerInputs]]]


def fold_block(
    student: Student,
    block: Section,
    quantizer_of: Callable[[Sequence[str]], Quantizer],
    rows_of: Callable[[CaptureSpec], TaskRows],
    token: int | None,
) -> bool:
    """Folds the scales of all layers of a block whose quantizer is a transform. Returns whether it read inputs.

    `rows_of`: the inputs of a step in the current block. `token`: see CaptureSpec. All scales are computed before any
    is folded, so that they all come from the original weights.
    """
    folds, measured = [], False
    for step in foldable(block):
        names = [block.name(name) for name in step.names]
        transform = quantizer_of(names)
        if isinstance(transform, Transform):
            lone = None if step.mixing else token
            spec = CaptureSpec(step.names, None, frozenset(), lone, step.memory, route=step.route)
            inputs, measured = measure_inputs(rows_of(spec), student.guidance), True
            weight = torch.cat([student.own(f"{name}.weight") for name in names])
            folds.append((step, names, transform.scales(weight, inputs, student.dtype)))
    for step, names, scales in folds:
        if scales is not None and step.producer is not None:
            student.fold(block.name(step.producer), names, scales)
    return measured


def foldable(block: Section) -> list[Linears]:
    """The layers of a block with a producer that can be scaled channel by channel: a norm with a gain, or a linear with
    an output for each of the layer's inputs (grouped-query attention has fewer values)."""
    steps = [step for step in block.steps if isinstance(step, Linears) and step.producer is not None]
    return [step for step in steps if _fits(block.module, step.names[0], step.producer or "")]


def _fits(module: nn.Module, reader: str, producer: str) -> bool:
    source = module.get_submodule(producer)
    width = module.get_parameter(f"{reader}.weight").shape[1]
    return has_gain(source) and len(source.get_parameter("weight")) == width


def measure_inputs(tasks: TaskRows, guidance: Guidance) -> InputStatistics:
    """The statistics of the student's inputs over all tasks, weighted as in the objective, and over all processes."""
    hessian, magnitude, total, width = torch.zeros(()), torch.zeros(()), 0.0, 0
    largest = torch.zeros(())
    for task, batches in tasks:
        measure, absolute = Measure(distributed), torch.zeros((), dtype=torch.float64)
        for rows in batches:
            x, weights = rows.student[0], rows.weights
            measure.add(x, None, weights)
            size = x.abs()
            absolute = absolute + (size.sum(0) if weights is None else weights @ size).double()
            width = x.shape[1]
            if len(x):  # an expert of a mixture may read no token
                largest = torch.maximum(largest.to(size), size.amax(0))
        moments = measure.moments()
        s = task_weight(moments.norm, moments.tokens, guidance.task_weight) * guidance.factor(task)
        hessian, magnitude = hessian + s * moments.xx, magnitude + s * distributed.all_reduce(absolute)
        total += s * moments.tokens
    return InputStatistics(
        distributed.all_gather_rows(hessian, width),
        magnitude / total if total > 0 else magnitude,
        torch.stack(distributed.all_gather(largest.cpu().expand(width))).amax(0).to(hessian.device),
    )
