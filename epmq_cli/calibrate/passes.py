"""Walks through one student, one or several, and the widths of the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from epmq_cli.calibrate.activations.store import Depot
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.progress import Account, Walked
from epmq_cli.calibrate.reference_weights import Reference
from epmq_cli.calibrate.walk import QuantizerOf, walk
from epmq_cli.data.batching import ALL, Batch
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Linears
from epmq_cli.pipeline.progress import State
from epmq_cli.quantize.mixed_precision import MixedPrecision, Trial
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import Quantizer


def sweep(
    student: nn.Module,
    family: Family,
    batches: Mapping[str, Sequence[Batch]],
    reference: Reference,
    guidance: Guidance,
    quantizer: Quantizer | MixedPrecision,
    dtype: torch.dtype,
    depot: Depot | None = None,
    state: State | None = None,
    samples: int = ALL,
) -> Walked:
    """`guidance.sweeps` walks: all but the last unquantized, each anchored at the result of the one before.

    Mixed precision measures the losses of its two formats in the first walk, which is done twice if it is the only one.
    `state`: where what is finished is kept.
    `samples`: see walk.
    """
    groups = _groups(student, family)
    trial, single = (Trial(quantizer), NoQuantizer()) if isinstance(quantizer, MixedPrecision) else (None, quantizer)
    first: QuantizerOf = lambda names: NoQuantizer() if trial is None else trial.of(groups[names[0]])  # noqa: E731
    kept = state or State()

    def walked(name: str, quantizer_of: QuantizerOf, account: Account | None = None) -> Walked:
        journal = kept.journal(name, account)
        return walk(student, family, batches, reference, guidance, quantizer_of, dtype, depot, journal, samples)

    if trial is not None and guidance.sweeps == 1:
        walked("widths", first, trial)
        reference.restore(student)
    for number in range(guidance.sweeps - 1):
        chosen: QuantizerOf = first if number == 0 else lambda _: NoQuantizer()
        walked(f"sweep-{number}", chosen, trial if number == 0 else None)
        guidance = replace(guidance, rho=1)
    if trial is None:
        return walked("last", lambda _: single)
    chosen_for = trial.choose()
    return walked("last", lambda names: chosen_for[groups[names[0]]])


def _groups(student: nn.Module, family: Family) -> dict[str, str]:
    """For each linear of the blocks the first of those that read the same input."""
    return {
        block.name(name): block.name(step.names[0])
        for block in family.blocks(student)
        for step in block.steps
        if isinstance(step, Linears)
        for name in step.names
    }
