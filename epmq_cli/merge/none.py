"""No merge: the base itself, for measuring what merging adds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from epmq_cli.merge.source import ElementwiseRule, MergeSource


def keep_base(base: Tensor, experts: list[Tensor]) -> Tensor:
    """The base's tensor as it is."""
    return base


@dataclass(frozen=True)
class NoMerge:
    """`merge=none`."""

    def __call__(self, source: MergeSource) -> ElementwiseRule:
        return keep_base
