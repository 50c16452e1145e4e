"""Walks through one student, one or several, and the widths of the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.progress import Account, WalkResult
from epmq_cli.calibrate.reference_weights import ReferenceWeights
from epmq_cli.calibrate.walk import QuantizerOf, walk
from epmq_cli.data.batching import ALL, Batch
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Linears
from epmq_cli.pipeline.progress import RunProgress
from epmq_cli.quantize.mixed_precision import Trial, allocate
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import Quantizer


def run_passes(
    student: nn.Module,
    family: Family,
    batches: Mapping[str, Sequence[Batch]],
    reference: ReferenceWeights,
    guidance: Guidance,
    quantizer: Quantizer,
    dtype: torch.dtype,
    store: ActivationStore | None = None,
    state: RunProgress | None = None,
    samples: int = ALL,
) -> WalkResult:
    """`guidance.sweeps` walks: all but the last unquantized, each anchored at the result of the one before.

    Where the quantizer has two widths, what they lose is measured in the first walk, which is done twice if it is the
    only one; q, k and v get the same width, as kernels that fuse them need it. `state`: where what is finished is kept.
    `samples`: see walk.
    """
    groups = _groups(student, family)
    trial = Trial(quantizer)
    mixed = len(quantizer.widths) > 1
    first: QuantizerOf = lambda names: trial.of(groups[names[0]]) if mixed else NoQuantizer()  # noqa: E731
    kept = state or RunProgress()

    def run_walk(name: str, quantizer_of: QuantizerOf, account: Account | None = None) -> WalkResult:
        walk_progress = kept.walk_progress(name, account)
        return walk(student, family, batches, reference, guidance, quantizer_of, dtype, store, walk_progress, samples)

    if mixed and guidance.sweeps == 1:
        run_walk("widths", first, trial)
        reference.restore(student)
    for number in range(guidance.sweeps - 1):
        chosen: QuantizerOf = first if number == 0 else lambda _: NoQuantizer()
        run_walk(f"sweep-{number}", chosen, trial if number == 0 else None)
        guidance = replace(guidance, rho=1)
    if not mixed:
        return run_walk("last", lambda _: quantizer)
    widths = allocate(trial.losses, trial.sizes, quantizer.bits)
    last: QuantizerOf = lambda names: quantizer.at(widths[groups[names[0]]])  # noqa: E731
    return run_walk("last", last)


def _groups(student: nn.Module, family: Family) -> dict[str, str]:
    """For each linear of the blocks the first of those that read the same input."""
    return {
        block.name(name): block.name(step.names[0])
        for block in family.blocks(student)
        for step in block.steps
        if isinstance(step, Linears)
        for name in step.names
    }
