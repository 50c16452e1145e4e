"""One group of linears that read the same input: from its objective to weights on a grid, and the record of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epmq_cli.calibrate.objective import Objective
from epmq_cli.quantize.grid import DenseWeight, QuantizedWeight
from epmq_cli.quantize.result import Quantizer


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
    objective: Objective,
    names: Sequence[str],
    tokens: int,
    quantizer: Quantizer,
    dtype: torch.dtype,
) -> tuple[Sequence[QuantizedWeight | DenseWeight], list[LayerRecord]]:
    """Targets and quantized weights of the linears of one group, their rows quantized in one go since they share H."""
    targets, solved = objective.targets()
    outcome = quantizer(torch.cat(targets).float(), objective.hessian, dtype)
    found = outcome.weight.split([len(target) for target in targets])
    records = [
        LayerRecord(
            name=name,
            bits=getattr(getattr(found[index], "spec", None), "bits", None),
            tokens=tokens,
            condition=None if solved is None else solved.condition,
            target_damping=None if solved is None else solved.damping,
            damping=outcome.damping,
            damping_retries=outcome.retries + (0 if solved is None else solved.retries),
            loss_merged=objective.anchor_loss(index),
            loss_target=objective.relative_loss(index, targets[index]),
            loss=objective.relative_loss(index, found[index].dequantize()),
            fallback=outcome.fallback,
        )
        for index, name in enumerate(names)
    ]
    return found, records
