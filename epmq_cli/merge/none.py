"""No merge: returns the base, as a baseline for merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from epmq_cli.merge.method import ElementwiseRule, MergeData, Need
from epmq_cli.merge.parameters import Parameters
from epmq_cli.merge.source import MergeSource


@dataclass(frozen=True)
class NoMerge(Parameters):
    """`merge=none`."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    core: ClassVar[bool | str] = False

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model."""
        return ElementwiseRule(lambda piece: piece.base)
