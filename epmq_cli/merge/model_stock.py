"""Model Stock: interpolates between the base and the average of the experts, by the angles between the task vectors
(Jang et al. 2024, https://arxiv.org/abs/2403.19522, section 4, equation 2).

The ratio t is clamped to [0, 1], unlike in mergekit, where task vectors that point away from each other give a t below
0 of any size. Cosines of short task vectors are exact; mergekit sets the product of their lengths to at least 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from epmq_cli.merge.gram import as_rows, cosines, gram, row_grams
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Parameters
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


def mean_cosine(products: Tensor) -> Tensor:
    """(...) in float64: the mean cosine between each two of n vectors, from their inner products (..., n, n); 0 for a
    vector of zeros."""
    lengths, n = products.diagonal(dim1=-2, dim2=-1).sqrt(), products.shape[-1]
    every = cosines(products, lengths[..., None] * lengths[..., None, :])
    return (every.sum((-2, -1)) - every.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))


def ratio(cosine: Tensor, n: int) -> Tensor:
    """The paper's t for n experts, in [0, 1]: the share of their average."""
    positive = cosine.clamp(min=0)
    return n * positive / (1 + (n - 1) * positive)


def model_stock(name: str, base: Tensor, experts: Mapping[str, Tensor], filter_wise: bool) -> Tensor:
    """Base plus t times the mean task vector. With `filter_wise`, each row of a matrix has its own t."""
    shape, base = base.shape, as_rows(base)
    vectors = [as_rows(experts[task]) - base for task in experts]
    cosine = mean_cosine(row_grams(vectors))[:, None] if filter_wise else mean_cosine(gram(vectors))
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    t = ratio(cosine, len(vectors)) / len(vectors)
    return (base + t.float() * total).view(shape)


@dataclass(frozen=True)
class ModelStock(Parameters):
    """`merge=model_stock`: `filter_wise` computes t for each row of a matrix, and not for each tensor."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    experts: ClassVar[tuple[int, int | None]] = (2, None)

    filter_wise: bool

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model. The rule holds one tensor of all experts."""
        return TensorRule(partial(model_stock, filter_wise=self.filter_wise))
