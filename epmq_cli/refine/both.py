"""`refine=both`: distillation of the dense model, then the rounding of its quantized blocks."""

from __future__ import annotations

from dataclasses import dataclass

from epmq_cli.errors import ConfigError, literal
from epmq_cli.refine.blocks import Blocks
from epmq_cli.refine.distill import Distill


@dataclass(frozen=True)
class Both:
    """The options of conf/refine/both.yaml."""

    distill: Distill
    blocks: Blocks

    def __post_init__(self) -> None:
        for name, kind in (("distill", Distill), ("blocks", Blocks)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(
                    f"refine.{name} must hold the options of refine={name}, such as refine.{name}.batch_size=8, "
                    f"got {literal(getattr(self, name))}"
                )
