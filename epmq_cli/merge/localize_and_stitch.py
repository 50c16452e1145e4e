"""Localize-and-Stitch without data: the largest elements of each task vector, averaged where several tasks have one (He
et al. 2024, https://arxiv.org/abs/2408.13656, section 4.3, "dataless").

The paper also learns masks on labelled samples, which epmq does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece
from epmq_cli.merge.parameters import Number, Parameters, PerTensor
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.ties import trim_thresholds

if TYPE_CHECKING:
    from torch import Tensor


def stitched(vectors: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """For each element (n,), the mean of the values that are not zero and not below their task vector's threshold."""
    total, number = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for vector, threshold in zip(vectors, thresholds, strict=True):
        mask = (vector.abs() >= threshold) & (vector != 0)
        total += torch.where(mask, vector, 0)
        number += mask
    return total / number.clamp(min=1)


@dataclass(frozen=True)
class LocalizeAndStitch(Parameters):
    """`merge=localize_and_stitch`.

    `density`: the fraction of each task vector that is kept, over all tensors, in (0, 1]. `scale`: factor on the merged
    task vector.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    density: Annotated[float, Number(0, 1, open_low=True)]
    scale: Annotated[Setting, PerTensor(0, 10)]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Reads all models twice, for the thresholds."""
        thresholds, scales = trim_thresholds(source, self.density), source.setting(self.scale, 1.0)

        def merge(piece: Piece) -> Tensor:
            vectors = list(piece.task_vectors().values())
            return piece.base + scales.at(piece.name) * stitched(vectors, thresholds)

        return ElementwiseRule(merge)
