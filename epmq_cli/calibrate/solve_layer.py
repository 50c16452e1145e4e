"""Solves one group of linears that read the same input, from its objective to quantized weights and their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from epmq_cli.calibrate.held_out_step import Step
from epmq_cli.calibrate.quadratic import Affine, QuadraticProblem
from epmq_cli.quantize.formats.format import DenseWeight, Grid, QuantizedWeight
from epmq_cli.quantize.quantizer import LayerProblem, Prepared, QuantizationResult, Quantizer, nothing
from epmq_cli.quantize.rtn import Rtn
from epmq_cli.runtime import distributed
from epmq_cli.runtime.products import fast_products


@dataclass(frozen=True)
class SolvedLinear:
    """The result of a linear: its weight, its bias (out,), or None if the bias is unchanged, and the target that the
    weight approximates, (out, in)."""

    weight: QuantizedWeight | DenseWeight
    bias: Tensor | None
    target: Tensor


@dataclass(frozen=True)
class InputRange:
    """The inputs of a linear in calibration, over all tasks and processes: `tokens`, their number, and `largest`, their
    largest magnitude."""

    tokens: int
    largest: float


@dataclass(frozen=True)
class LayerRecord:
    """The entry of one linear in metrics.json.

    `bits`: its width, None if it stays dense. `tokens`: 0 if the inputs were not measured. `condition` of H (estimated
    from below). `target_damping` and `damping`: the damping that H needed to solve for the target and to quantize,
    relative to its mean diagonal; `damping_retries`: the number of times that one of them was raised. The losses of the
    anchor, of the unquantized target and of the result are relative to the energy of the outputs of the experts'
    weights; None if the inputs were not measured. `fallback`: the method that replaced the quantizer, if any.
    `step`: the share of the way from the merged weight to the unquantized optimum, None without `guidance.safe`.
    """

    name: str
    bits: int | None
    tokens: int
    condition: float | None
    target_damping: float | None
    damping: float
    damping_retries: int
    loss_merged: float | None
    loss_target: float | None
    loss: float | None
    fallback: str | None
    step: float | None = None


@fast_products()
def solve(
    problem: QuadraticProblem,
    names: Sequence[str],
    outs: list[int],
    inputs: InputRange,
    quantizer: Quantizer,
    dtype: torch.dtype,
    step: Step | None = None,
) -> tuple[list[SolvedLinear], list[LayerRecord]]:
    """Targets and quantized weights of the linears of one group.

    The linears are stacked in the problem, with `outs` rows each, and quantized together because they share H. One
    process solves for the target while another prepares the quantizer; then each process does its own rows. `step`:
    towards the solution, if the target is not the solution itself.
    """
    (optimum, solved), prepared = distributed.split_jobs([problem.solve, partial(quantizer.prepare, problem.H)])
    target = optimum if step is None else step.towards(optimum)
    best = target[problem.rows]
    layer = LayerProblem(
        tuple(names),
        target.float(),
        problem.anchor.weight.float(),
        problem.H,
        dtype,
        float(target.abs().max()),
        inputs.largest,
    )
    weights, own, result = _quantized(quantizer, layer, outs, prepared)
    del layer, prepared  # before the losses take as much
    losses_of = partial(problem.loss, target=optimum, solved=solved)
    columns = [problem.anchor_loss(), losses_of(best), losses_of(own), problem.energy()]
    bias = problem.bias(own)
    gathered = distributed.all_gather_rows(torch.stack(columns if bias is None else [*columns, bias], 1), sum(outs))
    rows = torch.split(gathered, outs)
    records = []
    for index, name in enumerate(names):
        record = _record(name, weights[index], result)
        loss_merged, loss_target, loss = _relative(rows[index])
        record = replace(
            record,
            tokens=inputs.tokens,
            loss_merged=loss_merged,
            loss_target=loss_target,
            loss=loss,
            target_damping=None,
            step=None if step is None else step.share,
        )
        if solved is not None:
            retries = result.retries + solved.retries
            record = replace(record, condition=solved.condition, target_damping=solved.damping, damping_retries=retries)
        records.append(record)
    biases = [None if bias is None else part[:, 4] for part in rows]
    return [SolvedLinear(*parts) for parts in zip(weights, biases, torch.split(target, outs), strict=True)], records


def quantize_anchor(
    anchor: Affine, names: Sequence[str], outs: list[int], quantizer: Quantizer, dtype: torch.dtype
) -> tuple[list[SolvedLinear], list[LayerRecord]]:
    """`solve` without inputs: the anchor is the target, and the quantizer needs no Hessian.

    A quantizer that needs one rounds to nearest: these are experts of a mixture that no token reached.
    """
    weight, unrouted = anchor.weight.float(), "inputs" in quantizer.needs
    layer = LayerProblem(tuple(names), weight, weight, None, dtype, float(weight.abs().max()))
    if unrouted and quantizer.format is not None:
        quantizer, layer = Rtn(quantizer.format, "mse"), replace(layer, inputs=0.0)
    weights, _, result = _quantized(quantizer, layer, outs, nothing())
    result = replace(result, fallback="rtn") if unrouted else result
    records = [_record(name, weight, result) for name, weight in zip(names, weights, strict=True)]
    targets = torch.split(anchor.weight, outs)
    return [SolvedLinear(weight, None, target) for weight, target in zip(weights, targets, strict=True)], records


def _quantized(
    quantizer: Quantizer, layer: LayerProblem, outs: list[int], prepared: Prepared
) -> tuple[Sequence[QuantizedWeight | DenseWeight], Tensor, QuantizationResult]:
    """The weight of each linear of a layer, with `outs` rows each; this process's rows of all, dequantized; and a
    result with the facts about them.

    Processes split the rows. Where rows share scales, each process quantizes all, linear by linear, so that blocks of
    rows begin with each linear.
    """
    rows = distributed.row_range(sum(outs))
    if quantizer.format is None or quantizer.format.row_block == 1:
        own = replace(layer, weight=layer.weight[rows], anchor=layer.anchor[rows])
        result = quantizer.quantize(own, prepared)
        return _split(result.weight, outs), result.weight.dequantize(), result
    parts = zip(layer.names, torch.split(layer.weight, outs), torch.split(layer.anchor, outs), strict=True)
    results = [
        quantizer.quantize(replace(layer, names=(name,), weight=weight, anchor=anchor), prepared)
        for name, weight, anchor in parts
    ]
    weights = [result.weight for result in results]
    return weights, torch.cat([weight.dequantize() for weight in weights])[rows], results[0]


def _record(name: str, weight: QuantizedWeight | DenseWeight, result: QuantizationResult) -> LayerRecord:
    """The record of a linear whose inputs were not measured."""
    return LayerRecord(
        name=name,
        bits=weight.format.bits if isinstance(weight, QuantizedWeight) else None,
        tokens=0,
        condition=None,
        target_damping=0.0,
        damping=result.damping,
        damping_retries=result.retries,
        loss_merged=None,
        loss_target=None,
        loss=None,
        fallback=result.fallback,
    )


def _relative(rows: Tensor) -> list[float]:
    """The three losses of a linear relative to its energy, from those of its rows; 0 if the energy is 0."""
    *losses, energy = rows[:, :4].sum(0).tolist()
    return [max(loss, 0.0) / energy if energy > 0 else 0.0 for loss in losses]


def _split(part: QuantizedWeight | DenseWeight, outs: list[int]) -> Sequence[QuantizedWeight | DenseWeight]:
    """The weight of each linear, with `outs` rows each, gathered from the rows of all processes."""
    if isinstance(part, DenseWeight):
        return DenseWeight(distributed.all_gather_rows(part.weight, sum(outs))).split(outs)
    codes = distributed.all_gather_rows(part.codes.view(torch.int8), sum(outs)).view(part.format.storage)
    scale = distributed.all_gather_rows(part.grid.scale, sum(outs))
    zero = None if part.grid.zero is None else distributed.all_gather_rows(part.grid.zero, sum(outs))
    return QuantizedWeight(codes, Grid(scale, zero), part.format, part.dtype).split(outs)
