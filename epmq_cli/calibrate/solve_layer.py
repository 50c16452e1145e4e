"""One group of linears that read the same input: from its objective to weights on a grid, and the record of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from epmq_cli.quantize.formats.int import DenseWeight, QuantizedWeight
from epmq_cli.quantize.layer_problem import LayerProblem
from epmq_cli.quantize.quantizer import Quantizer
from epmq_cli.runtime import distributed


@dataclass(frozen=True)
class SolvedLinear:
    """What a linear becomes: its weight, and its bias (out,), or None where that stays as it is."""

    weight: QuantizedWeight | DenseWeight
    bias: Tensor | None


@dataclass(frozen=True)
class LayerRecord:
    """What metrics.json says of one linear.

    `bits`: its width, None where it stays dense. `condition` of H (estimated from below); `target_damping` and
    `damping`: what H needed, relative to its mean diagonal, to solve for the target and to quantize;
    `damping_retries`: how often one of the two had to be raised; losses relative to the energy of what the experts'
    weights give, of the anchor, of the unquantized target and of the result; `fallback`: the method that stood in, if
    any.
    """

    name: str
    bits: int | None
    tokens: int
    condition: float | None
    target_damping: float | None
    damping: float
    damping_retries: int
    loss_merged: float
    loss_target: float
    loss: float
    fallback: str | None


def solve(
    problem: LayerProblem,
    names: Sequence[str],
    outs: list[int],
    tokens: int,
    quantizer: Quantizer,
    dtype: torch.dtype,
) -> tuple[list[SolvedLinear], list[LayerRecord]]:
    """Targets and quantized weights of the linears of one group, stacked in the problem with so many rows each
    (`outs`): they are quantized in one go since they share H. One process solves while another prepares for the
    quantizer; then each does its own rows."""
    (target, solved), prepared = distributed.split_jobs([problem.solve, partial(quantizer.prepared, problem.H)])
    wanted = target[problem.rows]
    outcome = quantizer(wanted.float(), problem.H, prepared, dtype)
    own = outcome.weight.dequantize()
    losses_of = partial(problem.loss, target=target, solved=solved)
    columns = [problem.anchor_loss(), losses_of(wanted), losses_of(own), problem.energy()]
    bias = problem.bias(own)
    found = distributed.all_gather_rows(torch.stack(columns if bias is None else [*columns, bias], 1), sum(outs))
    weights, rows = _split(outcome.weight, outs), torch.split(found, outs)
    losses = [_relative(part) for part in rows]
    records = [
        LayerRecord(
            name=name,
            bits=getattr(getattr(weights[index], "spec", None), "bits", None),
            tokens=tokens,
            condition=None if solved is None else solved.condition,
            target_damping=None if solved is None else solved.damping,
            damping=outcome.damping,
            damping_retries=outcome.retries + (0 if solved is None else solved.retries),
            loss_merged=losses[index][0],
            loss_target=losses[index][1],
            loss=losses[index][2],
            fallback=outcome.fallback,
        )
        for index, name in enumerate(names)
    ]
    biases = [None if bias is None else part[:, 4] for part in rows]
    return [SolvedLinear(weight, bias) for weight, bias in zip(weights, biases, strict=True)], records


def _relative(rows: Tensor) -> list[float]:
    """The three losses of a linear relative to its energy, from those of its rows; 0 where that is 0."""
    *losses, energy = rows[:, :4].sum(0).tolist()
    return [max(loss, 0.0) / energy if energy > 0 else 0.0 for loss in losses]


def _split(part: QuantizedWeight | DenseWeight, outs: list[int]) -> Sequence[QuantizedWeight | DenseWeight]:
    """The weights of so many rows each, of which each process has its part."""
    if isinstance(part, DenseWeight):
        return DenseWeight(distributed.all_gather_rows(part.weight, sum(outs))).split(outs)
    values, scale, zero = (
        distributed.all_gather_rows(tensor, sum(outs)) for tensor in (part.values, part.scale, part.zero)
    )
    return replace(part, values=values, scale=scale, zero=zero).split(outs)
