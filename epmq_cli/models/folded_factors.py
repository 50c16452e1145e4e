"""Folds factors of the output channels of linears, such as the layer scales of DINOv2, into the linears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from epmq_cli.models.model_folder import Tensors

if TYPE_CHECKING:
    from torch import Tensor


class Folded:
    """The tensors of a model whose outputs are the same, in their stored types: the rows of linears are multiplied by
    their factors, and the factors are 1. `factors`: of each weight (out, in) and bias (out,), by stored name."""

    def __init__(self, tensors: Tensors, factors: Mapping[str, str]) -> None:
        self._tensors, self._factors, self._ones = tensors, factors, {*factors.values()}
        self.infos = tensors.infos

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this name."""
        stored = self._tensors.tensor(name)
        if name in self._ones:
            return torch.ones_like(stored)
        if name not in self._factors:
            return stored
        factor = self._tensors.tensor(self._factors[name]).float()
        return (stored.float() * factor.reshape(-1, *[1] * (stored.ndim - 1))).to(stored.dtype)
