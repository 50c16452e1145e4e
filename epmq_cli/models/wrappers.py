"""Names of tensors as training code wraps them, and the names that the base has for the same tensors.

DistributedDataParallel, FSDP, torch.compile, checkpointing of activations, PEFT, Lightning and code of one's own put
segments before the names of a model, or inside them. They are taken off where all tensors of the base are then there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder, TensorInfo, Tensors
from epmq_cli.runtime.console import say

INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
"""Segments that wrappers put anywhere in a name."""
BEFORE = ("module.", "base_model.model.", "student.", "teacher.", "net.", "network.", "model.model.")
"""What no model of transformers has before all of its names."""
OUTPUT = "lm_head.weight"
TRIED = 16  # renamings, the most frequent first

Names = Callable[[ModelFolder], Mapping[str, str]]
"""The tensors of a model that are merged: the model's own name -> the name in its files. See Family.tensor_names."""


@dataclass(frozen=True)
class Renaming:
    """Segments taken out of all names, and a prefix that is replaced by another."""

    inside: tuple[str, ...] = ()
    old: str = ""
    new: str = ""

    def __call__(self, name: str) -> str:
        """The name after it."""
        name = ".".join(segment for segment in name.split(".") if segment not in self.inside)
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name

    def __str__(self) -> str:
        taken = [*(f"{segment}." for segment in self.inside), *([self.old] if self.old and not self.new else [])]
        parts = [f"without {' and '.join(map(repr, taken))}"] if taken else []
        if self.new:
            parts.append(
                f"with {self.new!r} in place of {self.old!r}" if self.old else f"with {self.new!r} before them"
            )
        return " and ".join(parts)


class Renamed:
    """Tensors under other names."""

    def __init__(self, tensors: Tensors, renaming: Renaming) -> None:
        self._tensors = tensors
        self.stored = {renaming(name): name for name in tensors.infos}
        self.infos: dict[str, TensorInfo] = {own: tensors.infos[name] for own, name in self.stored.items()}

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        return self._tensors.tensor(self.stored[name])


def unwrapped(expert: ModelFolder, base: ModelFolder, wanted: Collection[str], names: Names) -> ModelFolder:
    """An expert under names that the family knows: its own where these give all tensors that are wanted, which are the
    base's that are merged, or those without what a wrapper added. As it is where no renaming gives all.

    ModelError where several renamings do, from different tensors: then several models are in one file.
    """
    _refuse_unmerged(expert)
    if {*wanted} <= {*merged_names(expert, names)}:
        return expert
    sources: dict[tuple[str, ...], Renaming] = {}
    for renaming in renamings(expert.infos, {*base.infos, *wanted}):
        under = _renamed(expert, renaming)
        found = merged_names(under.folder, names)
        if {*wanted} <= {*found}:
            taken = tuple(under.tensors.stored[found[name]] for name in wanted)
            sources[taken] = max(sources.get(taken, renaming), renaming, key=lambda r: _changed(expert, r))
            if not renaming.old and not renaming.new:  # a prefix need not be replaced: any that fits does so by chance
                break
    if len(sources) > 1:
        first, second, *_ = map(str, sources.values())
        raise ModelError(
            f"{expert.role}: {expert.path} holds several models, since its names fit the base's both {first} and "
            f"{second}; save the state dict of the one that is meant"
        )
    for renaming in sources.values():
        say(f"{expert.role}: the names of its tensors are read {renaming}")
        return _renamed(expert, renaming).folder
    return expert


def misfit(expert: ModelFolder, base: ModelFolder, wanted: Collection[str], names: Names) -> str:
    """Why an expert lacks tensors of the base, as far as its names tell: how many it has, and under which renaming it
    has the most."""
    own = len({*wanted} & {*merged_names(expert, names)})
    counts = {
        renaming: len({*wanted} & {*merged_names(_renamed(expert, renaming).folder, names)})
        for renaming in renamings(expert.infos, {*base.infos, *wanted})
    }
    best = max(counts, key=lambda renaming: counts[renaming], default=Renaming())
    said = f"{own} of the base's {len(wanted)} tensors are in it"
    if counts.get(best, 0) > own:
        return f"{said}, and {counts[best]} when its names are read {best}"
    if {*wanted} - {*merged_names(expert, names)} == {OUTPUT}:
        return f"{said}; it was saved without its output layer, so save the whole model, with its head"
    return said if own else f"{said}, so it is of another architecture or saved by another library"


def refuse_wrapped(base: ModelFolder) -> None:
    """ModelError where the names of a base are those of a wrapper: transformers would not find its tensors."""
    known = [f"{segment}." for segment in INSIDE if _has(base.infos, segment)]
    known += [prefix for prefix in BEFORE if base.infos and all(name.startswith(prefix) for name in base.infos)]
    if known:
        example = next(name for name in base.infos if known[0] in name)
        raise ModelError(
            f"{base.role}: {base.path} has {known[0]!r}, which a wrapper adds, in the names of its tensors, such as "
            f"{example}, so transformers cannot load it; unwrap the model and save it again with save_pretrained"
        )


def renamings(names: Iterable[str], wanted: Collection[str]) -> list[Renaming]:
    """The renamings under which most of the names are among those wanted, the most frequent first, and none that makes
    one name of two."""
    stored = list(names)
    inside = tuple(segment for segment in INSIDE if _has(stored, segment) and not _has(wanted, segment))
    tails: dict[str, list[str]] = {}
    for name in wanted:
        for tail in _tails(name):
            tails.setdefault(tail, []).append(name)
    counted: Counter[tuple[str, str]] = Counter()
    for name in map(Renaming(inside), stored):
        common = next((tail for tail in _tails(name) if tail in tails), None)
        if common is not None:
            old = name[: -len(common)]
            counted.update({(old, new[: -len(common)]) for new in tails[common]})
            counted.update({(old[: -len(rest)] if rest else old, "") for rest in ["", *_tails(old)]})
    pairs = dict.fromkeys([("", ""), *(pair for pair, _ in counted.most_common(TRIED))])
    found = [Renaming(inside, old, new) for old, new in pairs]
    return [renaming for renaming in found if len({renaming(name) for name in stored}) == len(stored)]


@dataclass(frozen=True)
class _Under:
    tensors: Renamed
    folder: ModelFolder


def _renamed(folder: ModelFolder, renaming: Renaming) -> _Under:
    """The model with its tensors under other names."""
    tensors = Renamed(folder, renaming)
    return _Under(tensors, ModelFolder(folder.path, folder.role, folder.config, tensors))


def merged_names(folder: ModelFolder, names: Names) -> Mapping[str, str]:
    """The tensors that are merged; none where the family finds another architecture."""
    try:
        return names(folder)
    except ModelError:
        return {}


def _changed(folder: ModelFolder, renaming: Renaming) -> int:
    return sum(renaming(name) != name for name in folder.infos)


def _refuse_unmerged(expert: ModelFolder) -> None:
    found = next((name for name in expert.infos if any(part.startswith("lora_") for part in name.split("."))), None)
    if found is not None:
        raise ModelError(
            f"{expert.role}: {expert.path} holds {found} beside the model's own tensors; give the folder that "
            "save_pretrained of peft writes, or merge the adapter with merge_and_unload and save the model"
        )


def _tails(name: str) -> list[str]:
    """A name and what is left of it without its first segments, the longest first; the last segment alone, which says
    too little, only where it is the whole name."""
    segments = name.split(".")
    return [".".join(segments[start:]) for start in range(max(len(segments) - 1, 1))]


def _has(names: Iterable[str], segment: str) -> bool:
    return any(segment in name.split(".") for name in names)
