"""NearSwap: moves each element of one model towards another one, by at most t
(alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001).

The source's a + min(1, t / |b - a|) (b - a) is a + clamp(b - a, -t, t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece
from epmq_cli.merge.parameters import Parameters, PerTensor
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.slerp import ends
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Nearswap(Parameters):
    """`merge=nearswap`.

    `t`: the largest change of an element, a setting. The first expert moves towards the second one; with one expert
    the base moves towards it.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    experts: ClassVar[tuple[int, int | None]] = (1, 2)

    t: Annotated[Setting, PerTensor(0, 1)]

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model."""
        limits = source.setting(self.t, 0.0)

        def merge(piece: Piece) -> Tensor:
            first, second = ends(piece.base, piece.experts)
            limit = limits.at(piece.name)
            return first + (second - first).clamp(-limit, limit)

        return ElementwiseRule(merge)
