"""Runs the walks of a calibration, and chooses the formats of the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.block_refinement import BlockRefiner, Chunks
from epmq_cli.calibrate.progress import Account, WalkProgress, WalkResult
from epmq_cli.calibrate.sensitivity import divergences
from epmq_cli.calibrate.student import Student
from epmq_cli.calibrate.walk import QuantizerOf, Walk
from epmq_cli.families.family import linear_groups
from epmq_cli.quantize.mixed_precision import MixedPrecision, Trial
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import Quantizer

LAST = "last"
"""The name of the walk that quantizes."""

ProgressFor = Callable[[str, Account | None], WalkProgress]
"""Opens the progress of the walk with this name. The account is stored with it."""


def no_progress(name: str, account: Account | None = None) -> WalkProgress:
    """Stores nothing."""
    return WalkProgress(account=account)


def run_passes(
    student: Student,
    chunks: Chunks,
    quantizer: Quantizer | MixedPrecision,
    store: ActivationStore | None = None,
    progress_for: ProgressFor = no_progress,
    refiner: BlockRefiner | None = None,
) -> WalkResult:
    """Runs `guidance.sweeps` walks. Only the last one quantizes. Each is anchored at the result of the one before.

    Mixed precision measures the losses of its formats in the first walk. If that is the only walk, it runs twice.
    `progress_for`: opens the progress of each walk. `chunks`, `store`: see Walk. `refiner`: of the last walk.
    """
    groups = linear_groups(student.model, student.family)
    trial, single = (Trial(quantizer), NoQuantizer()) if isinstance(quantizer, MixedPrecision) else (None, quantizer)
    first: QuantizerOf = lambda names: NoQuantizer() if trial is None else trial.of(groups[names[0]])  # noqa: E731
    guidance = student.guidance

    def run_walk(name: str, quantizer_of: QuantizerOf, account: Account | None = None) -> WalkResult:
        walker = replace(student, guidance=guidance)  # without the scales that an earlier walk has folded
        own = refiner if name == LAST else None
        parts = chunks if own is None else chunks.at_most(own.batch_size)
        result = Walk(walker, parts, quantizer_of, store, progress_for(name, account), own).run()
        if account is not None and trial is not None and trial.mixed.divergence is not None:
            trial.weigh(divergences(student, groups, trial.mixed.formats[0], trial.mixed.divergence))
        return result

    if trial is not None and guidance.sweeps == 1:
        run_walk("widths", first, trial)
        student.reference.restore(student.model)
    for number in range(guidance.sweeps - 1):
        chosen: QuantizerOf = first if number == 0 else lambda _: NoQuantizer()
        run_walk(f"sweep-{number}", chosen, trial if number == 0 else None)
        guidance = replace(guidance, rho=1)
    if trial is None:
        return run_walk(LAST, lambda _: single)
    choices, quantizers = trial.choose(), trial.mixed.quantizers
    result = run_walk(LAST, lambda names: quantizers[choices[groups[names[0]]]])
    return replace(result, sensitivities=trial.sensitivities(choices, groups))
