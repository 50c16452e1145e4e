"""Walks through one student, one or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.reference import Reference
from epmq_cli.calibrate.walk import Walked, walk
from epmq_cli.families.family import Batch, Family
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.result import Quantizer


def sweep(
    student: nn.Module,
    family: Family,
    batches: Mapping[str, Sequence[Batch]],
    reference: Reference,
    guidance: Guidance,
    quantizer: Quantizer,
    dtype: torch.dtype,
) -> Walked:
    """`guidance.sweeps` walks: all but the last unquantized, each anchored at the result of the one before."""
    for _ in range(guidance.sweeps - 1):
        walk(student, family, batches, reference, guidance, lambda _: NoQuantizer(), dtype)
        guidance = replace(guidance, rho=1)
    return walk(student, family, batches, reference, guidance, lambda _: quantizer, dtype)
