"""Checks before calibration that the scales of a transform can be folded into the producers that a family names.

One batch runs through each block with the outputs of a producer divided by arbitrary scales. The inputs of its layer
must then be divided by the same scales. With the layer's original outputs, the block's output must be unchanged,
because nothing else may read the producer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.activations.hidden_state import HiddenState, enter
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.activations.trace import Change, Trace, traced
from epmq_cli.calibrate.fold import foldable
from epmq_cli.data.batching import Batch, split
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Linears, Section

SAMPLES = 2  # samples that the check runs
TOLERANCE = 1e-3  # relative error that counts as rounding


@torch.inference_mode()
def check_producers(model: nn.Module, family: Family, batches: Mapping[str, Sequence[Batch]]) -> None:
    """ConfigError if a producer of a layer does not scale its inputs, or is read by something else."""
    batch = family.complete(model, split(next(iter(batches.values()))[0], SAMPLES)[0])
    for stack in family.stacks(model):
        stream = enter(model, family, stack, [batch], ActivationStore(math.inf))[0]
        stream.load()
        for block in stack.blocks:
            plain = _pass(block, stream, None)
            for step in foldable(block):
                if not _folds(block, stream, step, plain):
                    raise ConfigError(
                        f"the scales of input channels cannot be folded into {block.name(step.producer or '')} of "
                        f"{type(model).__name__}; use quant=gptq or quant=rtn"
                    )
            stream.finish(block.module)
        if stack.handed is not None:
            stream.finish(stack.readout.module)
            batch = {**batch, stack.handed: stream.load()}


def _folds(block: Section, stream: HiddenState, step: Linears, plain: Trace) -> bool:
    """Whether arbitrary scales between a layer and its producer leave the block's output unchanged."""
    name, width = step.names[0], plain.inputs[step.names[0]].shape[-1]
    scales = 1 + torch.arange(width, device=plain.output.device) % 7 / 4

    def change(module: str, output: Tensor, trace: Trace) -> Tensor:
        if module in step.names:
            return plain.outputs[module]
        return output / scales if module == step.producer else output

    changed = _pass(block, stream, change)
    return _close(changed.inputs[name] * scales, plain.inputs[name]) and _close(changed.output, plain.output)


def _pass(block: Section, stream: HiddenState, change: Change | None) -> Trace:
    fresh = replace(stream, forward_pass=None, handle=None)
    with traced(block, change, stream.hidden) as trace:
        fresh.finish(block.module)
    trace.output = fresh.hidden
    return trace


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= TOLERANCE * other.norm())
