"""`refine=both`: distillation of the dense model, then the rounding of its quantized blocks."""

from __future__ import annotations

from dataclasses import dataclass

from epmq_cli.refine.blocks import Blocks
from epmq_cli.refine.distill import Distill


@dataclass(frozen=True)
class Both:
    """The options of conf/refine/both.yaml."""

    distill: Distill
    blocks: Blocks
