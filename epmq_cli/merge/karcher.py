"""Karcher mean: the mean of the experts' directions on the sphere, times their mean length (Karcher 1977,
https://doi.org/10.1002/cpa.3160300502; as a merge in mergekit, https://github.com/arcee-ai/mergekit).

Each iterate is a sum of the experts' unit tensors, each times a factor. So the iteration needs only their inner
products, and computes the factors in float64. If the unit tensors cancel, no direction is their mean, and the result is
the average of the experts; mergekit starts from the first one, so that their order counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.gram import combination, gram
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Number, Parameters
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor

OPPOSITE = 1e-6  # of the sine: vectors this close to the opposite of the mean have no direction from it


def mean_on_sphere(products: Tensor, max_iter: int, tol: float) -> Tensor | None:
    """(n,) in float64: the factors of n unit vectors whose sum is their mean on the sphere, from their inner products
    (n, n); None if the vectors cancel."""
    n = len(products)
    mean = torch.full((n,), 1 / n, dtype=torch.float64)
    if length(mean, products) < tol:
        return None
    mean /= length(mean, products)
    for _ in range(max_iter):
        cosine = (products @ mean).clamp(-1, 1)
        angle, sine = cosine.acos(), (1 - cosine.square()).sqrt()
        counts = (angle >= tol) & ((cosine > 0) | (sine > OPPOSITE))
        share = torch.where(counts, angle / sine / n, 0.0)
        step = share - (share * cosine).sum() * mean
        size = length(step, products)
        if size < tol:
            break
        mean = size.cos() * mean + size.sin() / size * step
        mean /= length(mean, products)
    return mean


def length(factors: Tensor, products: Tensor) -> Tensor:
    """() the length of a sum of vectors with these factors and inner products."""
    return (factors @ products @ factors).clamp(min=0).sqrt()


def karcher(name: str, base: Tensor, experts: Mapping[str, Tensor], max_iter: int, tol: float) -> Tensor:
    """The Karcher mean of the experts' directions, times the mean of their lengths. Tensors of a length up to `tol`
    have no direction."""
    tensors = [experts[task] for task in experts]
    if len(tensors) == 1:
        return tensors[0]
    products = gram(tensors)
    lengths = products.diagonal().sqrt()
    chosen = (lengths > tol).nonzero().flatten()
    units = products[chosen][:, chosen] / (lengths[chosen, None] * lengths[chosen])
    mean = mean_on_sphere(units, max_iter, tol) if len(chosen) else None
    factors = torch.full_like(lengths, 1 / len(tensors))
    if mean is not None:
        factors = torch.zeros_like(lengths)
        factors[chosen] = lengths.mean() * mean / lengths[chosen]
    return combination(factors.tolist(), tensors)


@dataclass(frozen=True)
class Karcher(Parameters):
    """`merge=karcher`: `max_iter` is the largest number of steps, and `tol` the length of a step, in radians, at which
    they end."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    core: ClassVar[bool | str] = False

    max_iter: Annotated[int, Number(1, 10_000, integer=True)]
    tol: Annotated[float, Number(0, 1, open_low=True)]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model. The rule holds one tensor of all experts."""
        return TensorRule(partial(karcher, max_iter=self.max_iter, tol=self.tol))
