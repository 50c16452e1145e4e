"""What training changes: numbers from which tensors of the model follow, one for each tensor."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from epmq_cli.quantize.formats.format import QuantizedWeight, by_group
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.rounding import on_grid, rounded

if TYPE_CHECKING:
    from torch import Tensor

UNIT = 10  # steps of the grid that a code moves where other tensors move by 1, so that one learning rate fits both


class Trained(Protocol):
    """The numbers of each tensor: how they start, what the tensor is, and their gradient. All by the tensor's name."""

    @property
    def whole(self) -> bool:
        """Whether the numbers are the tensors themselves."""

    def start(self, name: str, tensor: Tensor) -> Tensor:
        """The numbers of the tensor as it is."""

    def tensor(self, name: str, numbers: Tensor) -> Tensor:
        """The tensor that follows from the numbers."""

    def gradient(self, name: str, gradient: Tensor, numbers: Tensor) -> Tensor:
        """The gradient of the numbers for a gradient of the tensor."""


class DenseTensors:
    """The tensors themselves are trained."""

    whole = True

    def start(self, name: str, tensor: Tensor) -> Tensor:
        """See Trained."""
        return tensor.clone()

    def tensor(self, name: str, numbers: Tensor) -> Tensor:
        """See Trained."""
        return numbers

    def gradient(self, name: str, gradient: Tensor, numbers: Tensor) -> Tensor:
        """See Trained."""
        return gradient


class LowRankUpdates:
    """Of matrices, an update B A of a small rank is trained (LoRA, https://arxiv.org/abs/2106.09685); other tensors are
    trained themselves. The numbers of a matrix (out, in) are B' and A side by side, (rank, out + in). B starts at 0, A
    at random numbers that depend on `seed` and the tensor's name.

    `matrices`: names of the tensors that get updates.
    """

    whole = False

    def __init__(self, matrices: Collection[str], rank: int, seed: int) -> None:
        self._matrices, self._rank, self._seed = frozenset(matrices), rank, seed
        self._starts: dict[str, Tensor] = {}

    def start(self, name: str, tensor: Tensor) -> Tensor:
        """See Trained."""
        if name not in self._matrices:
            return tensor.clone()
        self._starts[name] = tensor.clone()
        out, width = tensor.shape
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        random = torch.randn(self._rank, width, generator=generator) / width**0.5
        return torch.cat([torch.zeros(self._rank, out), random], 1).to(tensor)

    def tensor(self, name: str, numbers: Tensor) -> Tensor:
        """See Trained."""
        start = self._starts.get(name)
        if start is None:
            return numbers
        own = numbers.to(start)
        return start + own[:, : len(start)].T @ own[:, len(start) :]

    def gradient(self, name: str, gradient: Tensor, numbers: Tensor) -> Tensor:
        """See Trained."""
        start = self._starts.get(name)
        if start is None:
            return gradient
        own = numbers.to(gradient)
        left, right = own[:, : len(start)], own[:, len(start) :]
        return torch.cat([right @ gradient.T, left @ gradient], 1)


class PackedTensors:
    """Quantized weights whose codes do not change: factors (out, groups) of the scales are trained, as in the second
    phase of EfficientQAT (https://arxiv.org/abs/2407.11062). Other tensors are trained themselves. All are rounded to
    the type in which the checkpoint stores them; gradients pass through the rounding as if it was not there.

    `weights`: by tensor name. `dtype`: of the other tensors.
    """

    whole = False

    def __init__(self, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype
        self._starts: dict[str, Tensor] = {}  # dequantized weights, from their first gradient on

    def start(self, name: str, tensor: Tensor) -> Tensor:
        """See Trained."""
        weight = self._weights.get(name)
        return tensor.clone() if weight is None else torch.ones_like(weight.grid.scale)

    def weight(self, name: str, numbers: Tensor) -> QuantizedWeight:
        """The quantized weight that follows from the numbers."""
        weight = self._weights[name]
        return weight.rescaled(numbers.to(weight.grid.scale))

    def tensor(self, name: str, numbers: Tensor) -> Tensor:
        """See Trained."""
        if name in self._weights:
            return self.weight(name, numbers).dequantize()
        return numbers.to(self._dtype).to(numbers.dtype)

    def gradient(self, name: str, gradient: Tensor, numbers: Tensor) -> Tensor:
        """See Trained."""
        weight = self._weights.get(name)
        if weight is None:
            return gradient
        if name not in self._starts:
            self._starts[name] = weight.dequantize()
        return by_group(gradient * self._starts[name], weight.format).sum(-1)


class RoundedTensors(PackedTensors):
    """Quantized weights whose codes are trained, by offsets (out, in) in `UNIT` steps of the grid, and whose scales do
    not change: gradients pass through the rounding as if it was not there (https://arxiv.org/abs/1308.3432), but not
    those of codes beyond the ends of the grid. Formats of integers only."""

    def start(self, name: str, tensor: Tensor) -> Tensor:
        """See Trained."""
        return torch.zeros_like(tensor) if name in self._weights else tensor.clone()

    def weight(self, name: str, numbers: Tensor) -> QuantizedWeight:
        """See PackedTensors."""
        weight = self._weights[name]
        assert isinstance(weight.format, IntFormat)
        codes = rounded(self._positions(name, numbers), weight.format)
        return replace(weight, codes=codes.to(weight.codes.dtype))

    def gradient(self, name: str, gradient: Tensor, numbers: Tensor) -> Tensor:
        """See Trained."""
        weight = self._weights.get(name)
        if weight is None:
            return gradient
        assert isinstance(weight.format, IntFormat)
        scaled = (by_group(gradient, weight.format) * (UNIT * weight.grid.scale)[..., None]).reshape(gradient.shape)
        return scaled * on_grid(self._positions(name, numbers), weight.format)

    def _positions(self, name: str, numbers: Tensor) -> Tensor:
        """The codes before rounding, (out, in)."""
        weight = self._weights[name]
        return weight.codes + UNIT * numbers.to(weight.grid.scale)
