"""Arcee Fusion: takes those elements of an expert that matter most, and leaves the others as they are (Arcee 2024, in
mergekit, https://github.com/arcee-ai/mergekit).

The importance of an element is its change times the divergence between its row before and after, read as logits. An
element is taken if its importance is at least the median plus 1.5 times the distance between the quartiles. The
divergences are in float64 and the quartiles exact; mergekit samples a million elements of a larger tensor at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from epmq_cli.merge.gram import CHUNK
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Parameters
from epmq_cli.merge.slerp import ends
from epmq_cli.merge.source import MergeSource
from epmq_cli.runtime.threads import spread

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-8  # added to probabilities


def divergences(rows: Tensor, before: Tensor) -> Tensor:
    """(rows, 1): the Kullback-Leibler divergence of each row from the row before, both read as logits."""
    step = max(1, CHUNK // max(1, rows.shape[1]))

    def divergence(chunk: tuple[Tensor, Tensor]) -> Tensor:
        P, Q = (part.double().softmax(1) + FLOOR for part in chunk)
        return (P * (P / Q).log()).sum(1, keepdim=True).float()

    return torch.cat(spread(divergence, zip(torch.split(rows, step), torch.split(before, step), strict=True)))


def threshold(importance: Tensor) -> float:
    """The median of the elements, plus 1.5 times the distance between their quartiles."""
    last = importance.numel() - 1
    places = [int(share * last) for share in (0.25, 0.5, 0.75)]
    q1, median, q3 = (float(value) for value in np.partition(importance.flatten().numpy(), places)[places])
    return median + 1.5 * (q3 - q1)


def arcee_fusion(name: str, base: Tensor, experts: Mapping[str, Tensor]) -> Tensor:
    """The first end, with the important elements of the second."""
    first, second = ends(base, experts)
    if not first.numel():
        return first
    width = first.shape[-1] if first.ndim else 1
    before, after = first.reshape(-1, width), second.reshape(-1, width)
    importance = (after - before).abs() * divergences(after, before)
    return torch.where(importance >= threshold(importance), after, before).view(first.shape)


@dataclass(frozen=True)
class ArceeFusion(Parameters):
    """`merge=arcee_fusion`: takes elements of the second expert into the first; with one expert, into the base."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    core: ClassVar[bool | str] = False
    experts: ClassVar[tuple[int, int | None]] = (1, 2)

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model. The rule holds one tensor of both models."""
        return TensorRule(arcee_fusion)
