"""Mixed precision: two number formats in one model, under a budget of bits on average.

Every group of linears that read the same input gets one of the two formats, which kernels that fuse q, k and v require.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from epmq_cli.errors import ConfigError, literal
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import LayerProblem, Need, Prepared, QuantizationResult, Quantizer, Transform
from epmq_cli.runtime import distributed

if TYPE_CHECKING:
    from torch import Tensor

Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True)
class MixedPrecision:
    """A quantizer in two formats: `low`, and `high` with more bits, which differ only in their format.

    `bits`: the maximum average over all weights. A first walk measures the loss of each group in each format (`Trial`);
    the last walk quantizes each group in the format that the trial chooses.
    """

    low: Quantizer
    high: Quantizer
    bits: float

    def __post_init__(self) -> None:
        low, high = (quantizer.format for quantizer in (self.low, self.high))
        if low is None or high is None or not low.bits < self.bits < high.bits:
            raise ConfigError(f"mixed precision needs bits between those of its two formats, got {literal(self.bits)}")

    @property
    def quantizers(self) -> dict[int, Quantizer]:
        """The two quantizers by the bits of their formats."""
        return {quantizer.format.bits: quantizer for quantizer in (self.low, self.high) if quantizer.format is not None}


def formats_of(quantizer: Quantizer | MixedPrecision) -> tuple[NumberFormat, ...]:
    """The possible formats of a linear, in ascending order of bits; empty if weights stay dense."""
    own = (quantizer.low, quantizer.high) if isinstance(quantizer, MixedPrecision) else (quantizer,)
    return tuple(one.format for one in own if one.format is not None)


def transforms(quantizer: Quantizer | MixedPrecision) -> bool:
    """Whether the quantizer scales input channels."""
    return isinstance(quantizer.low if isinstance(quantizer, MixedPrecision) else quantizer, Transform)


def allocate(
    losses: Mapping[Group, Mapping[int, float]], sizes: Mapping[Group, int], budget: float
) -> dict[Group, int]:
    """The bits of each group, so that the mean over all weights is at most `budget`.

    `losses`: the loss of each group at each of two widths; `sizes`: its weights. Groups get the larger width in the
    order of their gain per weight, as long as it fits (the greedy rule of the knapsack problem).
    """
    low, high = sorted(next(iter(losses.values())))
    left = (budget - low) * sum(sizes.values())
    widths = dict.fromkeys(losses, low)
    for group in sorted(losses, key=lambda group: (losses[group][high] - losses[group][low]) / sizes[group]):
        cost = (high - low) * sizes[group]
        if losses[group][high] < losses[group][low] and cost <= left + 1e-9:
            widths[group], left = high, left - cost
    return widths


@dataclass
class Trial:
    """Measures the losses of the groups in either format; weights stay dense.

    `losses`: tr (Q - W) H (Q - W)' relative to tr W H W', by group and bits; `sizes`: weights by group.
    """

    mixed: MixedPrecision
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def state(self) -> Any:
        """The losses and sizes so far, as JSON."""
        return {"losses": {group: list(losses.items()) for group, losses in self.losses.items()}, "sizes": self.sizes}

    def restore(self, state: Any) -> None:
        """Replaces losses and sizes by those of `state`."""
        self.losses = {group: dict(losses) for group, losses in state["losses"].items()}
        self.sizes = dict(state["sizes"])

    def of(self, group: str) -> Quantizer:
        """A quantizer for linears of this group that measures and returns the weight itself."""
        return _Measuring(self, group)

    def choose(self) -> dict[str, Quantizer]:
        """The quantizer of each group, by the losses so far."""
        widths, quantizers = allocate(self.losses, self.sizes, self.mixed.bits), self.mixed.quantizers
        return {group: quantizers[width] for group, width in widths.items()}

    def measure(self, group: str, layer: LayerProblem, prepared: Prepared) -> None:
        """Quantizes a layer in either format and adds the losses, summed over all ranks' rows, to the group's."""
        target, hessian, quantizers = layer.weight.double(), layer.measured(), self.mixed.quantizers
        sums = [float(target.numel()), float(((target @ hessian) * target).sum())]
        for quantizer in quantizers.values():
            error = quantizer.quantize(layer, prepared).weight.dequantize().double() - target
            sums.append(float(((error @ hessian) * error).sum()))
        size, energy, *errors = distributed.all_reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
        losses = self.losses.setdefault(group, dict.fromkeys(quantizers, 0.0))
        self.sizes[group] = self.sizes.get(group, 0) + int(size)
        for bits, error in zip(quantizers, errors, strict=True):
            losses[bits] += error / energy if energy > 0 else 0.0


@dataclass(frozen=True)
class _Measuring:
    trial: Trial
    group: str
    format: NumberFormat | None = None

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})

    def prepare(self, hessian: Tensor) -> Prepared:
        """The part that both formats share, because only the format differs."""
        return self.trial.mixed.low.prepare(hessian)

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        self.trial.measure(self.group, layer, prepared)
        return NoQuantizer().quantize(layer, prepared)
