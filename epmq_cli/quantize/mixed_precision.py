"""Mixed precision: several number formats in one model, under a limit of bits on average or of bytes.

Every group of linears that read the same input gets one of the formats, which kernels that fuse q, k and v require.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.errors import ConfigError, literal
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.knapsack import allocate
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import LayerProblem, Need, Prepared, QuantizationResult, Quantizer, Transform
from epmq_cli.quantize.rtn import rtn
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
    """Quantizers that differ only in their formats, in ascending order of bits (`by_size`).

    One of two limits: `bits`, the maximum average over all weights, or `budget`, the maximum bytes of the weight files,
    whose parts are in `sizes` once the model is known. A first walk measures the loss of each group in each format
    (`Trial`); the last walk quantizes each group in the format that the trial chooses.

    `sensitivity`: see FormatOptions. `divergence`: keeps the outputs of the model as it is, and returns a function that
    measures how far later outputs are from them; None if `sensitivity` does not need it, or the model is not known.
    """

    quantizers: tuple[Quantizer, ...]
    bits: float | None = None
    budget: int | None = None
    sensitivity: str = "objective"
    sizes: Sizes | None = None
    divergence: Callable[[], Callable[[], float]] | None = None

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
    """A format that a group could have, by its name and group size; the loss of the group in it (see `Trial`), and its
    bytes, if they are known."""

    format: str
    group_size: int
    loss: float
    bytes: int | None


@dataclass(frozen=True)
class Sensitivity:
    """The entry in metrics.json of a group of linears that share a format: their names and number of weights, the
    formats that it could have, and name and group size of the one that it has."""

    linears: list[str]
    weights: int
    chosen: str
    group_size: int
    candidates: list[Candidate]


@dataclass
class Trial:
    """Measures the losses of the groups in every format; weights stay dense.

    `losses`: tr (Q - W) H (Q - W)' relative to tr W H W', by group, in the order of the quantizers; `weights`: their
    number by group. `probes`: the loss of rounding to nearest in the first format, which `weigh` needs.
    """

    mixed: MixedPrecision
    losses: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    probes: dict[str, float] = field(default_factory=dict)

    def state(self) -> Any:
        """The losses and numbers of weights so far, as JSON."""
        return {"losses": self.losses, "weights": self.weights, "probes": self.probes}

    def restore(self, state: Any) -> None:
        """Replaces losses and numbers of weights by those of `state`."""
        self.losses = {group: list(losses) for group, losses in state["losses"].items()}
        self.weights, self.probes = dict(state["weights"]), dict(state["probes"])

    def weigh(self, divergences: Mapping[str, float]) -> None:
        """Multiplies the losses of each group by the divergence of the outputs for each loss. `divergences`: with the
        group alone rounded to nearest in the first format."""
        for group, probe in self.probes.items():
            factor = divergences[group] / probe if probe > 0 else 0.0
            self.losses[group] = [factor * loss for loss in self.losses[group]]

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
        formats, sizes = self.mixed.formats, self.mixed.sizes
        return [
            Sensitivity(
                [name for name, own in group_of.items() if own == group],
                self.weights[group],
                formats[chosen[group]].name,
                formats[chosen[group]].group_size,
                [
                    Candidate(
                        format.name, format.group_size, loss, None if sizes is None else sizes.groups[group][index]
                    )
                    for index, (format, loss) in enumerate(zip(formats, losses, strict=True))
                ],
            )
            for group, losses in self.losses.items()
        ]

    def measure(self, group: str, layer: LayerProblem, prepared: Prepared) -> None:
        """Quantizes a layer in every format and adds the losses, summed over all ranks' rows, to the group's.
        `prepared`: by the first quantizer."""
        target, hessian = layer.weight.double(), layer.measured()
        quantizers, formats = self.mixed.quantizers, self.mixed.formats
        sums = torch.zeros(3 + len(quantizers), dtype=torch.float64)
        sums[0], sums[1] = target.numel(), ((target @ hessian) * target).sum()
        if self.mixed.divergence is not None:
            error = rtn(layer.weight, formats[0], "mse", layer.dtype).dequantize().double() - target
            sums[2] = ((error @ hessian) * error).sum()
        for size in dict.fromkeys(format.group_size for format in formats):
            same = [index for index, format in enumerate(formats) if format.group_size == size]
            own = prepared if 0 in same else quantizers[same[0]].prepare(hessian)
            for index in same:
                error = quantizers[index].quantize(layer, own).weight.dequantize().double() - target
                sums[3 + index] = ((error @ hessian) * error).sum()
        count, energy, *errors = distributed.all_reduce(sums).tolist()
        known = [self.probes.get(group, 0.0), *self.losses.get(group, [0.0] * len(quantizers))]
        self.probes[group], *self.losses[group] = (
            loss + (error / energy if energy > 0 else 0.0) for loss, error in zip(known, errors, strict=True)
        )
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
        """The part that the first format shares with all formats of its group size."""
        return first_of(self.trial.mixed).prepare(hessian)

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        self.trial.measure(self.group, layer, prepared)
        return NoQuantizer().quantize(layer, prepared)
