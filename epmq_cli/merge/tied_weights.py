"""Tied tensors of a suite's models, and which of them stay tied in the merge.

The model's class in transformers says which tensors can be tied. Config and tensors decide which are, as when
transformers loads a model: a stored copy that equals its source is tied, one that differs is a tensor of its own, and a
copy that is stored alone holds the source's values. A copy stays tied if it is tied in the base and in every expert.
Otherwise it becomes a tensor of its own, for which models that tie it give their source's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from epmq_cli.errors import ModelError
from epmq_cli.families.family import Family
from epmq_cli.merge.vocabulary import vocabulary_of
from epmq_cli.models.model_class import TIE, ModelClass, equal, model_class, untied_config
from epmq_cli.models.model_folder import ModelFolder


@dataclass
class Member:
    """One model of a suite: all its tensors (`stored`) and those to merge (`merged`), both name -> stored name."""

    folder: ModelFolder
    stored: dict[str, str]
    merged: dict[str, str]
    known: ModelClass | None = None
    tied: dict[str, str] = field(default_factory=dict)
    """copy -> source, by the config."""
    tieable: dict[str, str] = field(default_factory=dict)
    """copy -> source, if the config said that embeddings are tied."""
    spelled: dict[str, str] = field(default_factory=dict)
    """name -> the class's name, for these tensors."""
    sources: dict[str, str] = field(default_factory=dict)
    """source -> the stored name of its values, where the source itself is not stored."""

    def value(self, name: str) -> str | None:
        """The stored name of a source's values."""
        return self.sources.get(name) or self.stored.get(name)

    def is_source(self, copy: str, source: str) -> bool:
        """Whether a copy has the values of its source: it is not stored, or stored with equal values."""
        stored, origin = self.stored.get(copy), self.value(source)
        if stored is None or stored == origin:
            return True
        return origin is not None and equal((self.folder, stored), (self.folder, origin))


@dataclass(frozen=True)
class Ties:
    """The result's ties.

    `written`: names in the result's files of merged tensors that the base stores under another name or not at all.
    `dropped`: stored names of the base's tensors that are not written, such as copies. `untied`: copies that are tied
    in the base and tensors of their own in the result. `changes`: keys to change in config.json. `said`: a sentence for
    the user where a copy was untied.
    """

    written: dict[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    untied: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    said: str | None = None


def are_plain(base: Member, experts: Mapping[str, Member]) -> bool:
    """Whether names, shapes and configs show that no model ties its tensors differently. Then transformers, which takes
    seconds to import, is not asked."""
    settings = {str(_setting(member.folder.config)) for member in (base, *experts.values())}
    names = [set(member.stored) for member in (base, *experts.values())]
    twice = any(_tables(member.folder) > 1 for member in (base, *experts.values()))
    return len(settings) == 1 and all(found == names[0] for found in names) and not twice


def _setting(config: Mapping[str, Any]) -> list[Any]:
    nested = [value for value in config.values() if isinstance(value, dict)]
    return [config.get(TIE), *(value.get(TIE) for value in nested)]


def _tables(folder: ModelFolder) -> int:
    """The number of matrices with a row for each token, or with as many rows as the longest matrix."""
    shapes = [info.shape for info in folder.infos.values() if len(info.shape) == 2]
    rows = vocabulary_of(folder.config) or max((shape[0] for shape in shapes), default=0)
    return sum(shape[0] == rows for shape in shapes)


def ask_classes(family: Family, members: list[Member]) -> None:
    """Fills in the class of each model, and which tensors its config ties."""
    for member in members:
        member.known = model_class(member.folder.config, member.folder.infos)
        if member.known is not None:
            member.tied, member.tieable = (
                {family.spelling(copy): family.spelling(source) for copy, source in pairs.items()}
                for pairs in (member.known.tied, member.known.tieable)
            )
            names = [*member.known.tieable, *member.known.tieable.values()]
            member.spelled = {family.spelling(name): name for name in names}
            for copy, source in member.tied.items():
                if source not in member.stored and copy in member.stored:
                    member.sources.setdefault(source, member.stored[copy])


def resolve_ties(family: Family, base: Member, experts: Mapping[str, Member]) -> Ties:
    """The ties of the result; the merged tensors of all members become its own. ModelError where a model's tensors
    do not fit its class."""
    members = [base, *experts.values()]
    spelled = {name: own for member in reversed(members) for name, own in member.spelled.items()}
    pairs = {copy: source for member in members for copy, source in member.tieable.items()}
    for member in members if family.heads == "none" else ():  # models of other families have no output layer
        for copy, source in member.tieable.items():
            _check_there(member, copy, source)
    wanted = {copy for copy in pairs if any(copy in member.merged for member in members)}
    own = {copy: _differing(base, experts, copy, source) for copy, source in pairs.items() if copy in wanted}
    untied = [copy for copy, owner in own.items() if owner is not None]
    changes = _changes(base, [copy for copy in untied if copy in base.tied], spelled, own, pairs)
    if changes:
        loose = _tied_by(family, {**base.folder.config, **changes}, base)
        others = [copy for copy in base.tied if copy not in loose and copy not in untied]
        untied += [copy for copy in others if any(pairs[copy] in member.merged for member in members)]
    for copy, source in pairs.items():
        _place(members, copy, source, copy in untied)
    written = {source: spelled[source] for source in base.sources if source in base.merged}
    written |= {copy: base.stored.get(copy, spelled[copy]) for copy in untied if copy in base.merged}
    kept = [copy for copy in pairs if copy not in untied and copy in base.tied and copy in base.stored]
    lost = frozenset(base.stored[copy] for copy in kept if base.is_source(copy, pairs[copy]))
    new = tuple(copy for copy in untied if copy in base.tied)
    return Ties(written, lost, new, changes, _said(new, own, pairs, changes))


def _tied_by(family: Family, config: Mapping[str, Any], base: Member) -> set[str]:
    known = model_class(config, base.folder.infos)
    return {family.spelling(copy) for copy in known.tied} if known is not None else set()


def _differing(base: Member, experts: Mapping[str, Member], copy: str, source: str) -> ModelFolder | None:
    """The first model that has a tensor of its own in place of a copy; None where every model ties it, or the base has
    no such tensor."""
    if copy not in base.tied:
        return base.folder if copy in base.stored else None
    for member in (base, *experts.values()):
        if not member.is_source(copy, source):
            return member.folder
    return None


def _check_there(member: Member, copy: str, source: str) -> None:
    """ModelError where a model lacks a tensor that its config does not tie, though its class can."""
    loose = copy in member.tieable and copy not in member.tied
    if loose and copy not in member.stored and source in member.stored:
        raise ModelError(
            f"{member.folder.role}: {member.folder.path} has no {copy}, which its config does not tie to {source}; "
            f"save the model again with {copy}, or set {TIE} to true in config.json if the two are tied"
        )


def _changes(
    base: Member,
    own: list[str],
    spelled: Mapping[str, str],
    owners: Mapping[str, ModelFolder | None],
    pairs: Mapping[str, str],
) -> dict[str, Any]:
    """The keys of config.json that untie these copies. ModelError where the class always ties them. Output layers need
    no key: transformers loads them from the files."""
    if not own or base.known is None:
        return {}
    found = untied_config(base.folder.config, base.folder.infos, [spelled[copy] for copy in own])
    if found is not None:
        return {} if all(base.folder.config.get(key) == value for key, value in found.items()) else found
    for copy in own:
        if spelled[copy] not in base.known.outputs:
            owner, source = owners[copy] or base.folder, pairs[copy]
            raise ModelError(
                f"{owner.role}: {owner.path} stores {copy} with other values than {source}, to which "
                f"{base.known.name} always ties it; delete {copy} from its files if {source} is the trained tensor, or "
                "store the trained one under both names"
            )
    return {}


def _place(members: list[Member], copy: str, source: str, own: bool) -> None:
    """Merges a copy in each model if it is a tensor of its own (`own`), else drops it; and finds the stored name of the
    source's values."""
    scope = own or any(copy in member.merged for member in members)
    for member in members:
        stored, origin = member.stored.get(copy), member.value(source)
        if source in member.sources and scope:
            member.merged[source] = member.sources[source]
        member.merged.pop(copy, None)
        if own:
            value = origin if copy in member.tied and (stored is None or stored == origin) else stored
            if value is not None:
                member.merged[copy] = value


def _said(
    new: tuple[str, ...], own: Mapping[str, ModelFolder | None], pairs: Mapping[str, str], changes: Mapping[str, Any]
) -> str | None:
    named = [copy for copy in new if own.get(copy) is not None]
    if not named:
        return None
    copy, owner = named[0], own[named[0]]
    assert owner is not None
    how = f"{TIE} is false in config.json" if changes else "transformers 5 loads it so, earlier versions tie it"
    return f"{copy} is not tied to {pairs[copy]} in the {owner.role}: it is merged as a tensor of its own ({how})"
