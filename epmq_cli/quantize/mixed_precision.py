"""Mixed precision: which of two widths each group of linears gets, under a budget of bits on average."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from epmq_cli.quantize.formats.int import GridSpec
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.quantize.quantizer import Prepared, QuantizationResult, Quantizer
from epmq_cli.runtime import distributed

Group = TypeVar("Group", bound=Hashable)


def allocate(
    losses: Mapping[Group, Mapping[int, float]], sizes: Mapping[Group, int], budget: float
) -> dict[Group, int]:
    """The width of each group, so that the mean over all weights is at most `budget` bits.

    `losses`: what each group loses at each of the two widths; `sizes`: its weights. Groups get the larger width in the
    order of what that gains for each weight, as long as it fits (the greedy rule of the knapsack problem).
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
    """A stand-in for a quantizer that quantizes nothing, but notes what its widths would lose.

    `losses`: tr (Q - W) H (Q - W)' relative to tr W H W', by group and width; `sizes`: weights.
    """

    quantizer: Quantizer
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def state(self) -> Any:
        """All that was noted so far, as JSON has it."""
        return {"losses": {group: list(losses.items()) for group, losses in self.losses.items()}, "sizes": self.sizes}

    def restore(self, state: Any) -> None:
        """Notes this instead."""
        self.losses = {group: dict(losses) for group, losses in state["losses"].items()}
        self.sizes = dict(state["sizes"])

    def of(self, group: str) -> Quantizer:
        """The stand-in for linears of this group."""
        return _Account(self, group)

    def note(self, group: str, weight: Tensor, hessian: Tensor, prepared: Prepared, dtype: torch.dtype) -> None:
        """Tries every width on a weight (out, in) and adds what it loses, all processes' rows together, to the group's
        account."""
        target = weight.double()
        sums = [float(weight.numel()), float(((target @ hessian) * target).sum())]
        for width in self.quantizer.widths:
            found = self.quantizer.at(width)(weight, hessian, prepared, dtype).weight
            error = found.dequantize().double() - target
            sums.append(float(((error @ hessian) * error).sum()))
        size, energy, *errors = distributed.all_reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
        losses = self.losses.setdefault(group, dict.fromkeys(self.quantizer.widths, 0.0))
        self.sizes[group] = self.sizes.get(group, 0) + int(size)
        for width, error in zip(self.quantizer.widths, errors, strict=True):
            losses[width] += error / energy if energy > 0 else 0.0


@dataclass(frozen=True)
class _Account:
    trial: Trial
    group: str
    bits: float = 0.0
    widths: tuple[int, ...] = ()

    @property
    def spec(self) -> GridSpec | None:
        return None

    def at(self, width: int) -> Quantizer:
        return self

    def prepared(self, hessian: Tensor) -> Prepared:
        return self.trial.quantizer.prepared(hessian)

    def __call__(self, weight: Tensor, hessian: Tensor, prepared: Prepared, dtype: torch.dtype) -> QuantizationResult:
        self.trial.note(self.group, weight, hessian, prepared, dtype)
        return NoQuantizer()(weight, hessian, prepared, dtype)
