"""Maps tensor names that training wrappers changed to the names of the base.

DistributedDataParallel, FSDP, torch.compile, activation checkpointing, PEFT, Lightning and custom code add segments
before or inside the tensor names of a model. epmq removes them if the names then cover all tensors of the base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder, TensorInfo, Tensors
from epmq_cli.runtime.console import say

if TYPE_CHECKING:
    from torch import Tensor

INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
"""Segments that wrappers insert anywhere in a name."""
BEFORE = ("module.", "base_model.model.", "student.", "teacher.", "net.", "network.", "model.model.")
"""Prefixes that no transformers model has on all of its names."""
OUTPUT = "lm_head.weight"
TRIED = 16  # renamings, most frequent first

Names = Callable[[ModelFolder], Mapping[str, str]]
"""Returns the merged tensors of a model: own name -> stored name. See Family.tensor_names."""


@dataclass(frozen=True)
class Renaming:
    """Removes segments from all names and replaces a prefix."""

    inside: tuple[str, ...] = ()
    old: str = ""
    new: str = ""

    def __call__(self, name: str) -> str:
        """Renames one tensor."""
        name = ".".join(segment for segment in name.split(".") if segment not in self.inside)
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name

    def __str__(self) -> str:
        removals = [*(f"{segment}." for segment in self.inside), *([self.old] if self.old and not self.new else [])]
        parts = [f"without {' and '.join(map(repr, removals))}"] if removals else []
        if self.new:
            parts.append(
                f"with {self.new!r} in place of {self.old!r}" if self.old else f"with {self.new!r} before them"
            )
        return " and ".join(parts)


class Renamed:
    """Renamed tensors of another source."""

    def __init__(self, tensors: Tensors, renaming: Renaming) -> None:
        self._tensors = tensors
        self.stored = {renaming(name): name for name in tensors.infos}
        self.infos: dict[str, TensorInfo] = {own: tensors.infos[name] for own, name in self.stored.items()}

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this name."""
        return self._tensors.tensor(self.stored[name])


def unwrap(expert: ModelFolder, base: ModelFolder, targets: Collection[str], names: Names) -> ModelFolder:
    """Returns the expert under the names of the family.

    The expert stays unchanged if its own names cover all `targets`, the base tensors that the family merges, or if no
    renaming covers them. Raises ModelError if several renamings cover them with different tensors,
    because the file then contains several models.
    """
    _refuse_unmerged(expert)
    if {*targets} <= {*merged_names(expert, names)}:
        return expert
    sources: dict[tuple[str, ...], Renaming] = {}
    for renaming in renamings(expert.infos, {*base.infos, *targets}):
        under = _renamed(expert, renaming)
        stored = merged_names(under.folder, names)
        if {*targets} <= {*stored}:
            tensors = tuple(under.tensors.stored[stored[name]] for name in targets)
            sources[tensors] = max(sources.get(tensors, renaming), renaming, key=lambda r: _changed(expert, r))
            if not renaming.old and not renaming.new:  # the prefixes match already; any other match is a coincidence
                break
    if len(sources) > 1:
        first, second, *_ = map(str, sources.values())
        raise ModelError(
            f"{expert.role}: {expert.path} contains several models, because its names match the base both {first} and "
            f"{second}; save the state dict of one of them"
        )
    for renaming in sources.values():
        say(f"{expert.role}: its tensor names are read {renaming}")
        return _renamed(expert, renaming).folder
    return expert


def misfit(expert: ModelFolder, base: ModelFolder, targets: Collection[str], names: Names) -> str:
    """Explains from its names why an expert lacks tensors of the base.

    The text states how many it has, and which renaming gives the most.
    """
    own = len({*targets} & {*merged_names(expert, names)})
    counts = {
        renaming: len({*targets} & {*merged_names(_renamed(expert, renaming).folder, names)})
        for renaming in renamings(expert.infos, {*base.infos, *targets})
    }
    best = max(counts, key=lambda renaming: counts[renaming], default=Renaming())
    summary = f"it contains {own} of the base's {len(targets)} tensors"
    if counts.get(best, 0) > own:
        return f"{summary}, or {counts[best]} if its names are read {best}"
    if {*targets} - {*merged_names(expert, names)} == {OUTPUT}:
        return f"{summary}; it was saved without its output layer, so save the whole model with its head"
    return summary if own else f"{summary}, so it has another architecture or was saved by another library"


def refuse_wrapped(base: ModelFolder) -> None:
    """Raises ModelError if a wrapper changed the names of a base, because transformers would not find its tensors."""
    additions = [f"{segment}." for segment in INSIDE if _has(base.infos, segment)]
    additions += [prefix for prefix in BEFORE if base.infos and all(name.startswith(prefix) for name in base.infos)]
    if additions:
        example = next(name for name in base.infos if additions[0] in name)
        raise ModelError(
            f"{base.role}: {base.path} has tensor names with {additions[0]!r}, which a training wrapper adds, such as "
            f"{example}, so transformers cannot load it; unwrap the model and save it again with save_pretrained"
        )


def renamings(names: Iterable[str], targets: Collection[str]) -> list[Renaming]:
    """The renamings that map the most names to targets, most frequent first.

    Renamings that map two names to one are excluded.
    """
    stored = list(names)
    inside = tuple(segment for segment in INSIDE if _has(stored, segment) and not _has(targets, segment))
    tails: dict[str, list[str]] = {}
    for name in targets:
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
    candidates = [Renaming(inside, old, new) for old, new in pairs]
    return [renaming for renaming in candidates if len({renaming(name) for name in stored}) == len(stored)]


@dataclass(frozen=True)
class _Under:
    tensors: Renamed
    folder: ModelFolder


def _renamed(folder: ModelFolder, renaming: Renaming) -> _Under:
    """Returns the model with renamed tensors."""
    tensors = Renamed(folder, renaming)
    return _Under(tensors, ModelFolder(folder.path, folder.role, folder.config, tensors))


def merged_names(folder: ModelFolder, names: Names) -> Mapping[str, str]:
    """The merged tensors; empty if the family rejects the architecture."""
    try:
        return names(folder)
    except ModelError:
        return {}


def _changed(folder: ModelFolder, renaming: Renaming) -> int:
    return sum(renaming(name) != name for name in folder.infos)


def _refuse_unmerged(expert: ModelFolder) -> None:
    lora = next((name for name in expert.infos if any(part.startswith("lora_") for part in name.split("."))), None)
    if lora is not None:
        raise ModelError(
            f"{expert.role}: {expert.path} contains {lora} beside the model's own tensors; give the folder that "
            "save_pretrained of PEFT writes, or merge the adapter with merge_and_unload and save the model"
        )


def _tails(name: str) -> list[str]:
    """A name and its suffixes from each segment on, longest first.

    The last segment alone is too ambiguous; it counts only if it is the whole name.
    """
    segments = name.split(".")
    return [".".join(segments[start:]) for start in range(max(len(segments) - 1, 1))]


def _has(names: Iterable[str], segment: str) -> bool:
    return any(segment in name.split(".") for name in names)
