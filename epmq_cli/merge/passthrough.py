"""Passthrough: one model's tensors as they are, or times a factor. With slices, the layers of several models one after
the other (mergekit, https://github.com/arcee-ai/mergekit), as in models whose layers are repeated or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from epmq_cli.config.validate import check_keys
from epmq_cli.errors import ConfigError
from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece
from epmq_cli.merge.parameters import LARGEST_WEIGHT, Parameters, PerExpert, parameters_of
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.slices import Slice, by_module, range_of
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Passthrough(Parameters):
    """`merge=passthrough`.

    `scale`: factor on the tensors, a setting. `slices`: null for all layers of the only expert; or a list of
    {expert: TASK, layers: [FIRST, END], scale: SETTING}, without `scale` the one above; or such a list for each module.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    core: ClassVar[bool | str] = False
    experts: ClassVar[tuple[int, int | None]] = (1, 1)

    scale: Annotated[Setting, PerExpert(-LARGEST_WEIGHT, LARGEST_WEIGHT)] = 1
    slices: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.parts

    @property
    def parts(self) -> dict[str, list[Slice]] | None:
        """The slices of each module; None without slices."""
        if self.slices is None:
            return None
        found: dict[str, list[Slice]] = {}
        for module, entries in by_module(self.slices).items():
            for index, entry in enumerate(entries):
                where = f"merge.slices{f'.{module}' if module else ''}[{index}]"
                check_keys(where, entry, ("expert", "layers", "scale"), ("expert", "layers"))
                layers = range_of(f"{where}.layers", entry["layers"])
                own = Passthrough(entry.get("scale", self.scale), post=self.post)
                found.setdefault(module, []).append(Slice({str(entry["expert"]): layers}, own))
        return found

    def check(self, tasks: Sequence[str]) -> None:
        """ConfigError if the suite has several experts but no slices are given, or if a slice names another task."""
        if self.slices is None:
            if len(tasks) > 1:
                raise ConfigError(
                    f"merge=passthrough takes one expert, or several with merge.slices; the suite has {len(tasks)}"
                )
            super().check(tasks)
        parameters_of(Passthrough)["scale"].check_tasks("merge.scale", self.scale, tasks)
        for parts in (self.parts or {}).values():
            for part in parts:
                check_keys("merge.slices.expert", part.layers, tasks)

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Returns the rule; reads no model."""
        scales = source.setting(self.scale, 1.0)

        def merge(piece: Piece) -> Tensor:
            ((task, expert),) = piece.experts.items()
            return scales.at(piece.name, task) * expert

        return ElementwiseRule(merge)
