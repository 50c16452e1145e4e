"""What training changes: numbers from which tensors of the model follow, one for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from epmq_cli.quantize.formats.format import QuantizedWeight, by_group


class Trained(Protocol):
    """The numbers of each tensor: how they start, what the tensor is, and their gradient. All by the tensor's name."""

    def start(self, name: str, tensor: Tensor) -> Tensor:
        """The numbers of the tensor as it is."""

    def tensor(self, name: str, numbers: Tensor) -> Tensor:
        """The tensor that follows from the numbers."""

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient of the numbers for a gradient of the tensor."""


class DenseTensors:
    """The tensors themselves are trained."""

    def start(self, name: str, tensor: Tensor) -> Tensor:
        """See Trained."""
        return tensor.clone()

    def tensor(self, name: str, numbers: Tensor) -> Tensor:
        """See Trained."""
        return numbers

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """See Trained."""
        return gradient


class PackedTensors:
    """Quantized weights whose codes do not change: factors (out, groups) of the scales are trained, as in the second
    phase of EfficientQAT (https://arxiv.org/abs/2407.11062). Other tensors are trained themselves. All are rounded to
    the type in which the checkpoint stores them; gradients pass through the rounding as if it was not there.

    `weights`: by tensor name. `dtype`: of the other tensors.
    """

    def __init__(self, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype
        self._starts = {name: weight.dequantize() for name, weight in weights.items()}

    def start(self, name: str, tensor: Tensor) -> Tensor:
        """See Trained."""
        weight = self._weights.get(name)
        return tensor.clone() if weight is None else torch.ones_like(weight.grid.scale)

    def tensor(self, name: str, numbers: Tensor) -> Tensor:
        """See Trained."""
        weight = self._weights.get(name)
        if weight is None:
            return numbers.to(self._dtype).to(numbers.dtype)
        return weight.rescaled(numbers.to(weight.grid.scale)).dequantize()

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """See Trained."""
        weight = self._weights.get(name)
        return gradient if weight is None else by_group(gradient * self._starts[name], weight.format).sum(-1)
