"""Walks through one student, one or several, and the widths of the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.progress import Account, WalkProgress, WalkResult
from epmq_cli.calibrate.reference_weights import ReferenceWeights
from epmq_cli.calibrate.walk import QuantizerOf, walk
from epmq_cli.data.batching import ALL, Batch
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Linears
from epmq_cli.quantize.mixed_precision import Trial, allocate
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import Quantizer

ProgressFor = Callable[[str, Account | None], WalkProgress]
"""The progress of the walk of this name, with what is kept beside it."""


def in_memory(name: str, account: Account | None = None) -> WalkProgress:
    """The progress of a walk that keeps nothing on disk."""
    return WalkProgress(account=account)


def run_passes(
    student: nn.Module,
    family: Family,
    batches: Mapping[str, Sequence[Batch]],
    reference: ReferenceWeights,
    guidance: Guidance,
    quantizer: Quantizer,
    dtype: torch.dtype,
    store: ActivationStore | None = None,
    progress_for: ProgressFor = in_memory,
    samples: int = ALL,
) -> WalkResult:
    """`guidance.sweeps` walks: all but the last unquantized, each anchored at the result of the one before.

    Where the quantizer has two widths, what they lose is measured in the first walk, which is done twice if it is the
    only one; q, k and v get the same width, as kernels that fuse them need it. `progress_for`: keeps the progress of
    each walk. `samples`: see walk.
    """
    groups = _groups(student, family)
    trial = Trial(quantizer)
    mixed = len(quantizer.widths) > 1
    first: QuantizerOf = lambda names: trial.of(groups[names[0]]) if mixed else NoQuantizer()  # noqa: E731

    def run_walk(name: str, quantizer_of: QuantizerOf, account: Account | None = None) -> WalkResult:
        progress = progress_for(name, account)
        return walk(student, family, batches, reference, guidance, quantizer_of, dtype, store, progress, samples)

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
