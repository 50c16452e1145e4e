"""`refine=blocks`: learns the rounding of quantized weights block by block, in the memory of one block (after
AutoRound, https://arxiv.org/abs/2309.05516). Quantizers solve each layer alone; here the layers of a block compensate
for each other, and start from the quantizer's integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from epmq_cli.config.validate import check_choice, check_clip, check_range

if TYPE_CHECKING:
    from epmq_cli.refine.block_descent import BlockDescent


@dataclass(frozen=True)
class Blocks:
    """The options of conf/refine/blocks.yaml."""

    iterations: int
    every: int
    held_out: bool
    batch_size: int
    rounding_lr: float
    reach: float
    scale_lr: float
    norm_lr: float
    bias_lr: float
    clip: Any
    lam: float

    def __post_init__(self) -> None:
        check_range("refine.iterations", self.iterations, 1, 1_000_000, integer=True)
        check_range("refine.every", self.every, 1, 1_000_000, integer=True)
        check_choice("refine.held_out", self.held_out, (True, False))
        check_range("refine.batch_size", self.batch_size, 1, 1 << 20, integer=True)
        for name in ("rounding_lr", "scale_lr", "norm_lr", "bias_lr"):
            check_range(f"refine.{name}", getattr(self, name), 0, 1)
        check_range("refine.reach", self.reach, 0, 1000, open_low=True)
        check_clip("refine.clip", self.clip)
        check_range("refine.lam", self.lam, 0, 1e9)

    def refiner(self, seed: int) -> BlockDescent:
        """The refiner of a walk."""
        from epmq_cli.quantize.rounding import RoundingOptions
        from epmq_cli.refine.block_descent import BlockDescent  # imports torch

        return BlockDescent(
            iterations=self.iterations,
            every=self.every,
            held_out=self.held_out,
            batch_size=self.batch_size,
            rounding=RoundingOptions(self.rounding_lr, self.reach, self.scale_lr, (self.clip[0], self.clip[1])),
            norm_lr=self.norm_lr,
            bias_lr=self.bias_lr,
            lam=self.lam,
            seed=seed,
        )
