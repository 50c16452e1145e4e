"""Mixed precision: several number formats in one model, under a limit of bits on average or of bytes.

Every group of linears that read the same input gets one of the formats, which kernels that fuse q, k and v require.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.errors import ConfigError, literal
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.knapsack import allocate
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import LayerProblem, Need, Prepared, QuantizationResult, Quantizer, Transform
from epmq_cli.runtime import distributed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """The bytes of a checkpoint's weight files: `rest` of all but the quantized weights; `groups` of the weights of a
    group of linears in each format of a mix."""

    rest: int
    groups: Mapping[str, tuple[int, ...]]

    @property
    def smallest(self) -> int:
        """The bytes with the smallest format in every group."""
        return self.rest + sum(map(min, self.groups.values()))

    @property
    def largest(self) -> int:
        """The bytes with the largest format in every group."""
        return self.rest + sum(map(max, self.groups.values()))


@dataclass(frozen=True)
class MixedPrecision:
    """Quantizers that differ only in their formats, in ascending order of bits.

    One of two limits: `bits`, the maximum average over all weights, or `budget`, the maximum bytes of the weight files,
    whose parts are in `sizes` once the model is known. A first walk measures the loss of each group in each format
    (`Trial`); the last walk quantizes each group in the format that the trial chooses.
    """

    quantizers: tuple[Quantizer, ...]
    bits: float | None = None
    budget: int | None = None
    sizes: Sizes | None = None

    def __post_init__(self) -> None:
        low, high = self.formats[0].bits, self.formats[-1].bits
        if self.bits is not None and not low < self.bits < high:
            raise ConfigError(f"mixed precision needs bits between those of its formats, got {literal(self.bits)}")

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """The formats of the quantizers."""
        return tuple(one.format for one in self.quantizers if one.format is not None)


def formats_of(quantizer: Quantizer | MixedPrecision) -> tuple[NumberFormat, ...]:
    """The possible formats of a linear, in ascending order of bits; empty if weights stay dense."""
    if isinstance(quantizer, MixedPrecision):
        return quantizer.formats
    return () if quantizer.format is None else (quantizer.format,)


def first_of(quantizer: Quantizer | MixedPrecision) -> Quantizer:
    """The quantizer itself, or the first of a mix, from which the others differ only in their formats."""
    return quantizer.quantizers[0] if isinstance(quantizer, MixedPrecision) else quantizer


def transforms(quantizer: Quantizer | MixedPrecision) -> bool:
    """Whether the quantizer scales input channels."""
    return isinstance(first_of(quantizer), Transform)


@dataclass(frozen=True)
class Candidate:
    """A format that a group could have, the loss of the group in it (see `Trial`) and its bytes, if they are known."""

    format: str
    loss: float
    bytes: int | None


@dataclass(frozen=True)
class Sensitivity:
    """The entry in metrics.json of a group of linears that share a format: their names and number of weights, the
    formats that it could have, and the one that it has."""

    linears: list[str]
    weights: int
    chosen: str
    candidates: list[Candidate]


@dataclass
class Trial:
    """Measures the losses of the groups in every format; weights stay dense.

    `losses`: tr (Q - W) H (Q - W)' relative to tr W H W', by group, in the order of the quantizers; `weights`: their
    number by group.
    """

    mixed: MixedPrecision
    losses: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def state(self) -> Any:
        """The losses and numbers of weights so far, as JSON."""
        return {"losses": self.losses, "weights": self.weights}

    def restore(self, state: Any) -> None:
        """Replaces losses and numbers of weights by those of `state`."""
        self.losses = {group: list(losses) for group, losses in state["losses"].items()}
        self.weights = dict(state["weights"])

    def of(self, group: str) -> Quantizer:
        """A quantizer for linears of this group that measures and returns the weight itself."""
        return _Measuring(self, group)

    def choose(self) -> dict[str, int]:
        """The index of each group's quantizer, by the losses so far."""
        mixed = self.mixed
        if mixed.budget is not None and mixed.sizes is not None:
            return allocate(self.losses, mixed.sizes.groups, mixed.budget - mixed.sizes.rest)
        assert mixed.bits is not None
        costs = {group: [format.bits * count for format in mixed.formats] for group, count in self.weights.items()}
        return allocate(self.losses, costs, math.floor(mixed.bits * sum(self.weights.values()) + 1e-6))

    def sensitivities(self, chosen: Mapping[str, int], group_of: Mapping[str, str]) -> list[Sensitivity]:
        """The table of the groups. `group_of`: the group of each linear."""
        names, sizes = [format.name for format in self.mixed.formats], self.mixed.sizes
        return [
            Sensitivity(
                [name for name, own in group_of.items() if own == group],
                self.weights[group],
                names[chosen[group]],
                [
                    Candidate(name, loss, None if sizes is None else sizes.groups[group][index])
                    for index, (name, loss) in enumerate(zip(names, losses, strict=True))
                ],
            )
            for group, losses in self.losses.items()
        ]

    def measure(self, group: str, layer: LayerProblem, prepared: Prepared) -> None:
        """Quantizes a layer in every format and adds the losses, summed over all ranks' rows, to the group's."""
        target, hessian = layer.weight.double(), layer.measured()
        sums = [float(target.numel()), float(((target @ hessian) * target).sum())]
        for quantizer in self.mixed.quantizers:
            error = quantizer.quantize(layer, prepared).weight.dequantize().double() - target
            sums.append(float(((error @ hessian) * error).sum()))
        count, energy, *errors = distributed.all_reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
        known = self.losses.get(group, [0.0] * len(errors))
        self.losses[group] = [
            loss + (error / energy if energy > 0 else 0.0) for loss, error in zip(known, errors, strict=True)
        ]
        self.weights[group] = self.weights.get(group, 0) + int(count)


@dataclass(frozen=True)
class _Measuring:
    trial: Trial
    group: str
    format: NumberFormat | None = None

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})

    def prepare(self, hessian: Tensor) -> Prepared:
        """The part that all formats share, because only the format differs."""
        return first_of(self.trial.mixed).prepare(hessian)

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        self.trial.measure(self.group, layer, prepared)
        return NoQuantizer().quantize(layer, prepared)
