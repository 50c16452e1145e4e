"""Merges that change the layers: the result is a list of slices, each merged from a range of layers of some models
(mergekit, https://github.com/arcee-ai/mergekit), see `stacked.py`. For `epmq merge`, and for `epmq run
guidance=merged`, which needs no experts with the layers of the result.

A slice of `merge=slices` is {experts: {TASK: [FIRST, END], ...}, base: [FIRST, END], merge: METHOD}, where METHOD has
a `_target_` as the files in conf/merge have. Layers run from FIRST to before END; null stands for all. Without `base`
the method does not read the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from epmq_cli.config.validate import check_keys
from epmq_cli.errors import ConfigError, literal
from epmq_cli.merge.method import ElementwiseRule, MergeData, MergeMethod, Need, check_method, method_name
from epmq_cli.merge.source import MergeSource

Range = tuple[int, int] | None
"""Layers from the first to before the last; None for all."""


@dataclass(frozen=True)
class Slice:
    """Some layers of the result. `layers`: those of each task's expert; `base`: those of the base, if it is read."""

    layers: Mapping[str, Range]
    method: MergeMethod
    base: Range = None
    reads_base: bool = False

    @property
    def ranges(self) -> list[Range]:
        """The ranges of all models that are read."""
        return [*self.layers.values(), *([self.base] if self.reads_base else [])]


def sliced(method: MergeMethod) -> Mapping[str, list[Slice]] | None:
    """The slices of a method by module of the model; "" for the only module. None if it keeps the layers."""
    found: Mapping[str, list[Slice]] | None = getattr(method, "parts", None)
    return found


def range_of(where: str, value: Any) -> Range:
    """A range of layers. ConfigError unless it is [first, end] or null."""
    if value is None:
        return None
    whole = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(item) is int for item in value)
    if not whole or not 0 <= value[0] < value[1]:
        raise ConfigError(f"{where} must be [first, last + 1], such as [0, 16], or null for all, got {literal(value)}")
    return value[0], value[1]


def by_module(slices: Any) -> dict[str, list[Any]]:
    """The entries of `merge.slices` by module: a list is that of the only module."""
    modules = slices if isinstance(slices, Mapping) else {"": slices}
    for name, entries in modules.items():
        where = f"merge.slices{f'.{name}' if name else ''}"
        if not isinstance(entries, (list, tuple)) or not entries or not all(isinstance(e, Mapping) for e in entries):
            raise ConfigError(f"{where} must be a list of slices, got {literal(entries)}")
    if not modules:
        raise ConfigError("merge.slices must name at least one slice, got {}")
    return {str(name): list(entries) for name, entries in modules.items()}


def check_lengths(where: str, ranges: Sequence[Range]) -> None:
    """ConfigError unless all ranges of a slice have as many layers."""
    sizes = {None if each is None else each[1] - each[0] for each in ranges}
    if len(sizes) > 1:
        raise ConfigError(f"{where} must have as many layers of each model, got {', '.join(map(literal, ranges))}")


@dataclass(frozen=True)
class Slices:
    """`merge=slices`. `slices`: as above, or such a list for each module of the model, by its name."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    slices: Any

    def __post_init__(self) -> None:
        _ = self.parts

    @property
    def parts(self) -> dict[str, list[Slice]]:
        """The slices of each module."""
        return {
            module: [_slice(f"merge.slices{f'.{module}' if module else ''}[{i}]", entry) for i, entry in enumerate(own)]
            for module, own in by_module(self.slices).items()
        }

    def check(self, tasks: Sequence[str]) -> None:
        """ConfigError if a slice names a task that the suite lacks, or if its method does not fit."""
        for parts in self.parts.values():
            for part in parts:
                check_keys("merge.slices.experts", part.layers, tasks)
                check_method(part.method, list(part.layers))
                if part.method.needs:
                    raise ConfigError(
                        f"merge.slices cannot use {method_name(part.method)}, which needs calibration data; use a "
                        "method that reads only the models (see epmq list merge)"
                    )

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Never called, since the layers of the result are not those of the source; see `stacked.py`."""
        raise AssertionError("slices are merged one by one")


def _slice(where: str, entry: Mapping[str, Any]) -> Slice:
    check_keys(where, entry, ("experts", "base", "merge"), ("experts", "merge"))
    experts, method = entry["experts"], entry["merge"]
    if not isinstance(experts, Mapping) or not experts:
        raise ConfigError(f"{where}.experts must be a mapping from tasks to layers, got {literal(experts)}")
    if not hasattr(method, "fit"):
        raise ConfigError(f"{where}.merge needs a _target_, as the files in conf/merge have, got {literal(method)}")
    if sliced(method):
        raise ConfigError(f"{where}.merge must have no slices of its own; write its slices into merge.slices")
    layers = {str(task): range_of(f"{where}.experts.{task}", own) for task, own in experts.items()}
    made = Slice(layers, method, range_of(f"{where}.base", entry.get("base")), "base" in entry)
    check_lengths(where, made.ranges)
    return made
