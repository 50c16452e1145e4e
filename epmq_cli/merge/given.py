"""A merge that exists already, made by another program or by hand, in place of merging the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from epmq_cli.merge.method import MergeData, MergeMethod, Need, TensorRule
from epmq_cli.merge.parameters import Parameters
from epmq_cli.merge.source import MergeSource


@dataclass(frozen=True)
class Given(Parameters):
    """`merge=given`: `path` is the folder of a model with the base's tensors, or a hub id. Calibration starts from it
    and is anchored at it; the experts remain the teachers."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    core: ClassVar[bool | str] = False

    path: str

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule, which reads the given merge."""
        return TensorRule(lambda name, base, experts: source.given(name))


def given_path(method: MergeMethod) -> str | None:
    """The folder of the merge that exists already; None for methods that merge the experts."""
    return method.path if isinstance(method, Given) else None
