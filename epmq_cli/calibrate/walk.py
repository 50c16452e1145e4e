"""The engine: walks the student block by block, calibrating and quantizing each group of linears on the way.

The student's inputs always come through the prefix that is already quantized. Inside a block the groups go in the
order of the forward pass, and inputs are measured again after each ("true sequential"). Blocks are called with the
very arguments that the model itself passes them, caught at the first block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.guidance import Guidance, Objective
from epmq_cli.calibrate.moments import real_tokens, second_moment
from epmq_cli.console import track
from epmq_cli.errors import ModelError
from epmq_cli.families.family import Batch, Family
from epmq_cli.linalg import condition
from epmq_cli.quantize.grid import DenseWeight, QuantizedWeight
from epmq_cli.quantize.result import Quantizer

ExpertWeight = Callable[[str, str], Tensor]
"""(task, tensor name) -> the expert's tensor in float32, on any device."""


@dataclass(frozen=True)
class LayerRecord:
    """What metrics.json says of one linear.

    `condition` of H (estimated from below); `target_damping` and `damping`: what H needed, relative to its mean
    diagonal, to solve for the target and to quantize; `damping_retries`: how often one of the two had to be raised;
    losses relative to the target outputs' energy, of the merged weight, of the unquantized target and of the result;
    `fallback`: the method that stood in, if any.
    """

    name: str
    tokens: int
    condition: float | None
    target_damping: float | None
    damping: float
    damping_retries: int
    loss_merged: float
    loss_target: float
    loss: float
    fallback: str | None


@dataclass(frozen=True)
class Walked:
    """The result of a walk: each linear's weight by module name, and the records in the order of the walk."""

    weights: dict[str, QuantizedWeight | DenseWeight]
    records: list[LayerRecord]


@dataclass
class _Stream:
    """One batch on its way through the blocks: the next block's first argument, the others, and the mask of real
    tokens."""

    hidden: Tensor
    rest: tuple[Any, ...]
    options: dict[str, Any]
    mask: Tensor | None


class _ReachedError(Exception):
    """Raised inside a forward pass to end it once what was wanted has been caught."""


def walk(
    student: nn.Module,
    family: Family,
    batches: Mapping[str, Sequence[Batch]],
    expert_weight: ExpertWeight,
    guidance: Guidance,
    quantizer: Quantizer,
    dtype: torch.dtype,
) -> Walked:
    """Calibrates and quantizes every block's linears; the student's weights are replaced by what comes out.

    `batches`: calibration batches of each task, on the student's device. `dtype`: the type that scales are stored in.
    """
    blocks = family.blocks(student)
    streams = {task: _enter(student, family, blocks[0][1], group) for task, group in batches.items()}
    weights: dict[str, QuantizedWeight | DenseWeight] = {}
    records: list[LayerRecord] = []
    for (prefix, block), group in track(list(product(blocks, family.groups)), "calibrate and quantize"):
        names = [f"{prefix}.{linear}" for linear in group]
        linears = [block.get_submodule(linear) for linear in group]
        objective, tokens = _measure(block, linears, names, streams, expert_weight, guidance)
        found, new = _solve(objective, names, tokens, quantizer, dtype)
        for name, linear, weight in zip(names, linears, found, strict=True):
            linear.weight.copy_(weight.dequantize())  # type: ignore[operator]
            weights[name] = weight
        records += new
        if group == family.groups[-1]:
            _advance(block, streams)
    return Walked(weights, records)


def _enter(student: nn.Module, family: Family, first: nn.Module, batches: Sequence[Batch]) -> list[_Stream]:
    """The inputs of the first block for each batch."""
    streams = []
    for batch in batches:
        args, options = _inputs_of(first, lambda batch=batch: family.features(student, batch))  # type: ignore[misc]
        streams.append(_Stream(args[0], args[1:], options, family.token_mask(batch)))
    return streams


def _measure(
    block: nn.Module,
    linears: Sequence[nn.Module],
    names: Sequence[str],
    streams: Mapping[str, list[_Stream]],
    expert_weight: ExpertWeight,
    guidance: Guidance,
) -> tuple[Objective, int]:
    """The objective of the linears of one group, and the tokens it was measured on."""
    anchors = [linear.weight.detach().clone() for linear in linears]  # type: ignore[operator]
    objective, total = Objective(anchors, guidance), 0
    for task, batches in streams.items():
        moment, tokens = second_moment(_rows(block, linears[0], batches))
        if not torch.isfinite(moment).all():
            raise ModelError(
                f"the inputs of {names[0]} hold a NaN or an infinity on task {task}; check the experts and the merge"
            )
        experts = anchors
        if guidance.targets == "expert":
            experts = [expert_weight(task, f"{name}.weight").to(moment.device) for name in names]
        objective.add(moment, tokens, experts)
        total += tokens
    return objective, total


def _solve(
    objective: Objective,
    names: Sequence[str],
    tokens: int,
    quantizer: Quantizer,
    dtype: torch.dtype,
) -> tuple[Sequence[QuantizedWeight | DenseWeight], list[LayerRecord]]:
    """Targets and quantized weights of the linears of one group, their rows quantized in one go since they share H."""
    targets, factor = objective.targets()
    outcome = quantizer(torch.cat(targets).float(), objective.H, dtype)
    found = outcome.weight.split([len(target) for target in targets])
    records = [
        LayerRecord(
            name=name,
            tokens=tokens,
            condition=None if factor is None else condition(objective.H, factor),
            target_damping=None if factor is None else factor.damping,
            damping=outcome.damping,
            damping_retries=outcome.retries + (0 if factor is None else factor.retries),
            loss_merged=objective.relative_loss(index, objective.anchors[index]),
            loss_target=objective.relative_loss(index, targets[index]),
            loss=objective.relative_loss(index, found[index].dequantize()),
            fallback=outcome.fallback,
        )
        for index, name in enumerate(names)
    ]
    return found, records


def _rows(block: nn.Module, linear: nn.Module, streams: Sequence[_Stream]) -> Iterator[Tensor]:
    """The rows (tokens, in) that reach a linear of the block, batch by batch."""
    for stream in streams:
        args, _ = _inputs_of(linear, lambda stream=stream: block(stream.hidden, *stream.rest, **stream.options))  # type: ignore[misc]
        yield real_tokens(args[0], stream.mask)


def _advance(block: nn.Module, streams: Mapping[str, list[_Stream]]) -> None:
    """Sends every batch through the block."""
    for batches in streams.values():
        for stream in batches:
            output = block(stream.hidden, *stream.rest, **stream.options)
            stream.hidden = output[0] if isinstance(output, tuple) else output


def _inputs_of(module: nn.Module, forward: Callable[[], object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which a forward pass calls the module; the pass ends there."""
    with _stopped_at(module) as caught:
        try:
            forward()
        except _ReachedError:
            return caught[0]
    raise RuntimeError(f"the forward pass never called {type(module).__name__}")


@contextmanager
def _stopped_at(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        caught.append((args, options))
        raise _ReachedError

    handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield caught
    finally:
        handle.remove()
