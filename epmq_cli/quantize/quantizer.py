"""The interfaces of quantizers and transforms, their inputs and their results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch

from epmq_cli.quantize.formats.format import CALIBRATED, DenseWeight, NumberFormat, QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["inputs", "gradients", "block"]
"""The inputs of a quantizer beyond the weight: second moments of the layer's inputs, gradients, or the whole block."""


@dataclass(frozen=True)
class LayerProblem:
    """The input of a quantizer: linears that read the same input, stacked.

    `names`: the linears. `weight`: the target, float32 (out, in). `anchor`: the merged weight, float32 (out, in).
    `hessian`: H of the objective tr (Q - W) H (Q - W)', float64 (in, in); None if the inputs were not measured,
    because neither the guidance nor the quantizer needs them. `dtype`: the type that scales are stored in. `largest`:
    the largest magnitude in the target, over the rows of all processes; None if these are all rows. `inputs`: the
    largest magnitude of the inputs; None if they were not measured.
    """

    names: tuple[str, ...]
    weight: Tensor
    anchor: Tensor
    hessian: Tensor | None
    dtype: torch.dtype
    largest: float | None = None
    inputs: float | None = None

    def in_range(self, format: NumberFormat) -> NumberFormat:
        """The format for the range of this target and of these inputs (`NumberFormat.for_range`, `for_inputs`)."""
        own = format.for_range(float(self.weight.abs().max()) if self.largest is None else self.largest)
        if self.inputs is None:
            if format.activations in CALIBRATED:
                raise RuntimeError(f"the inputs of {self.names[0]} were not measured; its quantizer must need inputs")
            return own
        return own.for_inputs(self.inputs)

    def measured(self) -> Tensor:
        """The Hessian of a layer whose inputs were measured."""
        if self.hessian is None:
            raise RuntimeError(f"the inputs of {self.names[0]} were not measured; its quantizer must need inputs")
        return self.hessian


@dataclass(frozen=True)
class QuantizationResult:
    """A quantized weight; the relative damping, and the number of times that it was raised; `fallback`: the method that
    replaced a quantizer that could not be applied."""

    weight: QuantizedWeight | DenseWeight
    damping: float = 0.0
    retries: int = 0
    fallback: str | None = None


Prepared = tuple["Tensor", tuple[float, int] | None]
"""The part that a quantizer computes once for all rows of a layer: a tensor, and its damping and retries."""


def nothing() -> Prepared:
    """What a quantizer prepares that shares nothing between rows."""
    return torch.empty(0), None


class Quantizer(Protocol):
    """Quantizes one layer with a small error, measured by tr (Q - W) H (Q - W)' or by the weights alone."""

    @property
    def format(self) -> NumberFormat | None:
        """The number format of the weights; None if they stay dense."""

    @property
    def needs(self) -> frozenset[Need]:
        """The inputs of `prepare` and `quantize` beyond the weight. Without "inputs" the Hessian may be None."""

    def prepare(self, hessian: Tensor) -> Prepared:
        """Computes from the Hessian (in, in) the part that all rows share.

        The result depends on the format's group size alone, so that two formats of a mix share it.
        """

    def quantize(self, layer: LayerProblem, prepared: Prepared) -> QuantizationResult:
        """Quantizes a layer. Rows are independent of each other, so that processes can split them."""


class DataFree:
    """The methods of quantizers that need no inputs."""

    @property
    def needs(self) -> frozenset[Need]:
        """Empty: no inputs."""
        return frozenset()

    def prepare(self, hessian: Tensor) -> Prepared:
        """Prepares nothing."""
        return nothing()


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of a layer's inputs x (in,) for transforms, weighted sums over tokens in float64: `hessian` sum x x'
    (in, in), and `magnitude`, the mean of |x| (in,). `largest`: the largest |x| (in,), unweighted."""

    hessian: Tensor
    magnitude: Tensor
    largest: Tensor


@runtime_checkable
class Transform(Protocol):
    """A quantizer that first scales the input channels of a layer.

    The layer's weight is multiplied by the scales, and the outputs of its producer (the norm or linear in front of it)
    are divided by them, so that the unquantized model computes the same function.
    """

    def scales(self, weight: Tensor, inputs: InputStatistics, dtype: torch.dtype) -> Tensor | None:
        """The scales (in,) of a layer with this weight, float32 (out, in); None to leave it unscaled."""
